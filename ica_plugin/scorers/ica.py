"""In-Context Approximation: how much likelier a row becomes once the policy has seen holdout rows."""

from __future__ import annotations

import numpy as np

from .context import ScoringContext
from .needs import Needs

NAME = "ica"
SOURCE = "arXiv 2510.14459, eq. 7"
NEEDS = Needs(demonstrations=True)


def score(context: ScoringContext) -> np.ndarray:
    """`log π(y | C, x) − log π(y | x)`, see `in_context.ica_scores`; other scorers of a sum share its base pass.

    Returns:
        float64 [n], nats (per token with `length_normalize`).
    """
    return context.ica.score
