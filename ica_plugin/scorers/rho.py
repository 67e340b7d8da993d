"""RHO: what a model tuned on the holdout has learnt of a row, and the policy not yet."""

from __future__ import annotations

import numpy as np

from .context import ScoringContext
from .holdout_adapter import NEEDS_OF_BOTH, reducible_loss

NAME = "rho"
SOURCE = "RHO-Loss, arXiv 2206.07137, eq. 3"
NEEDS = NEEDS_OF_BOTH


def score(context: ScoringContext) -> np.ndarray:
    """`L(row; π) − L(row; π_holdout)`, the reducible holdout loss: see `holdout_adapter`.

    Returns:
        float64 [n], nats. Negative for undesirable rows.
    """
    return reducible_loss(context)
