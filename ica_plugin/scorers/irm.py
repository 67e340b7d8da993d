"""IRM: the implicit reward margin of a pair."""

from __future__ import annotations

import numpy as np

from ..log import get_logger
from .context import ScoringContext, require_pairs


def irm(context: ScoringContext) -> np.ndarray:
    """`β · { [log π(y_w|x) − log π_ref(y_w|x)] − [log π(y_l|x) − log π_ref(y_l|x)] }` (arXiv 2510.13212; the implicit reward
    of DPO, arXiv 2305.18290, eq. 5). π_ref is the policy with its adapter switched off.

    Before the first step of a new adapter π is π_ref and every margin is 0: score again later (`refresh_interval`), or
    start from a trained adapter.

    Returns:
        float64 [n], nats.

    Raises:
        ICAError: the rows are not pairs, or the policy has no adapter.
    """
    require_pairs(context, "irm")
    margins = context.beta * ((context.sums - context.reference_sums) @ np.array([1.0, -1.0]))
    if len(margins) and not np.nan_to_num(margins).any():
        get_logger().warning(
            "irm: the adapter has not been trained yet, so every implicit reward margin is 0 and tells no pair from another. "
            "Set `refresh_interval`, or start from a trained adapter."
        )
    return margins
