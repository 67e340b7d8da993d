"""LossDiff: the same for preference pairs, by the loss of the run."""

from __future__ import annotations

import numpy as np

from .context import ScoringContext
from .holdout_adapter import NEEDS_OF_BOTH, reducible_loss

NAME = "lossdiff"
SOURCE = "arXiv 2510.13212"
NEEDS = NEEDS_OF_BOTH


def score(context: ScoringContext) -> np.ndarray:
    """`L(row; π) − L(row; π_holdout)`, the difference of the losses: see `holdout_adapter`.

    Returns:
        float64 [n], nats. Negative for undesirable rows.
    """
    return reducible_loss(context)
