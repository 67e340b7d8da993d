"""IRM: the implicit reward margin of a pair."""

from __future__ import annotations

import numpy as np

from ..log import get_logger
from ..policy.losses import difference
from .context import ScoringContext
from .needs import Needs

NAME = "irm"
SOURCE = "arXiv 2510.13212; the implicit reward of DPO, arXiv 2305.18290, eq. 5"
NEEDS = Needs(pairs=True, reference=True)


def score(context: ScoringContext) -> np.ndarray:
    """`β · { [log π(y_w|x) − log π_ref(y_w|x)] − [log π(y_l|x) − log π_ref(y_l|x)] }`, the implicit reward margin.
    π_ref is the run's own reference model: `policy.reference`.

    Before the first step π is π_ref, unless the trainer was given another reference, and every margin is 0: score again later
    (`refresh_interval`).

    Returns:
        float64 [n], nats.
    """
    margins = context.beta * difference(context.sums - context.reference_sums)
    if len(margins) and not np.nan_to_num(margins).any() and not context.once.setdefault("told", False):
        context.once["told"] = True
        get_logger().warning(
            "irm: the policy is still its own reference (the adapter has not been trained yet), so every implicit reward margin is 0 "
            "and tells no pair from another. Set `refresh_interval`."
        )
    return margins
