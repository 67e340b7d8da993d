"""RDS+: representation-based data selection."""

from __future__ import annotations

import numpy as np

from ..data.store import Example
from .context import ScoringContext
from .needs import Needs

NAME = "rds"
SOURCE = "RDS+, arXiv 2503.01807, section 3.2"
NEEDS = Needs()


def score(context: ScoringContext) -> np.ndarray:
    """`max over holdout rows h of cos(e(row), e(h))`, e the position-weighted mean of the policy's last hidden states over
    prompt and (chosen) response: RDS+ (arXiv 2503.01807, section 3.2), there with a base model and a fixed set of tasks.

    RDS+ picks rows in turn, each holdout row its most similar one; a row's best similarity is the score form of that. A
    holdout row that is the row itself does not count.

    Returns:
        float64 [n] in [−1, 1]. Negative for undesirable rows; NaN where the holdout is that row alone.
    """
    shown = context.holdout.shown
    if "holdout_vectors" not in context.once:
        context.once["holdout_vectors"] = _unit_vectors(context, context.shown)
    similarity = _unit_vectors(context, context.whole) @ context.once["holdout_vectors"].T
    for i, row in enumerate(context.rows):
        similarity[i, [j for j, h in enumerate(shown) if h in context.holdout.hidden_from[row]]] = -np.inf
    best = similarity.max(axis=1)
    return context.sign * np.where(np.isfinite(best), best, np.nan)


def _unit_vectors(context: ScoringContext, rows: list[Example]) -> np.ndarray:
    """float64 [rows, H]."""
    if not rows:
        return np.zeros((0, context.once["holdout_vectors"].shape[1]))
    vectors = context.engine.embeddings([row.demonstration.unscored for row in rows], context.progress).astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
