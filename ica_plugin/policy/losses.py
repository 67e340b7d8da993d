"""Means and losses of rows from their log-probs."""

from __future__ import annotations

import numpy as np

from ..data.store import Example


def token_means(sums: np.ndarray, examples: list[Example]) -> np.ndarray:
    """float64 [n]: mean log-prob per token of the response, or chosen minus rejected for pairs. `sums`: [n, sequences]."""
    tokens = np.array([[max(int(s.scored.sum()), 1) for s in row.sequences] for row in examples])
    means = sums / tokens.reshape(sums.shape)
    return means[:, 0] - means[:, 1] if means.shape[1] == 2 else means[:, 0]


def losses(sums: np.ndarray, reference: np.ndarray | None, examples: list[Example], beta: float) -> np.ndarray:
    """Loss of each row from its log-probs, the one whose gradient `gradients.row_loss` gives.

    SFT and unpaired rows: −mean log-prob per token. Pairs: −log σ(β m), where m is the margin of the summed log-probs less
    that of the reference (DPO), or, without a reference, the margin of the means (SimPO without γ).

    Args:
        sums: float64 [n, sequences].
        reference: float64 [n, 2], pairs' log-probs under the reference; None for none.
        examples: n rows.
        beta: of pairs.

    Returns:
        float64 [n].
    """
    if sums.shape[1] == 1:
        return -token_means(sums, examples)
    margin = token_means(sums, examples) if reference is None else (sums - reference) @ np.array([1.0, -1.0])
    return np.logaddexp(0, -beta * margin)
