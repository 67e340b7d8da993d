"""Likelihood: what the policy thinks of the response without any context."""

from __future__ import annotations

import numpy as np

from ..policy.losses import token_means
from .context import ScoringContext
from .needs import Needs

NAME = "likelihood"
SOURCE = "the baseline of arXiv 2510.14459, and of the perplexity filters before it"
NEEDS = Needs()


def score(context: ScoringContext) -> np.ndarray:
    """`1/|y| · log π(y | x)`; for pairs the chosen response's less the rejected one's; negative for undesirable rows.

    Free beside `ica`, whose base pass it is.

    Returns:
        float64 [n], nats per token.
    """
    return context.sign * token_means(context.sums, context.examples)
