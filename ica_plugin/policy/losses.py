"""Means and losses of rows from their log-probs: each once, for numbers and for gradients alike."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ..data.store import Example

Values = TypeVar("Values", np.ndarray, torch.Tensor)


def token_means(sums: Values, examples: list[Example]) -> Values:
    """Mean log-prob per token of each row's response; for pairs that of the chosen less that of the rejected.

    Args:
        sums: [n, sequences], nats; a tensor keeps its gradient.
        examples: n rows.

    Returns:
        [n], nats per token, of the kind of `sums`.
    """
    counts = np.array([[max(int(s.scored.sum()), 1) for s in row.sequences] for row in examples]).reshape(sums.shape)
    return difference(sums / (counts if isinstance(sums, np.ndarray) else torch.from_numpy(counts).to(sums.device)))


def difference(values: Values) -> Values:
    """[n] from [n, sequences]: the only sequence's value; for pairs the chosen's less the rejected's."""
    return values[:, 0] - values[:, 1] if values.shape[1] == 2 else values[:, 0]


def losses(sums: torch.Tensor, reference: torch.Tensor | None, examples: list[Example], beta: float) -> torch.Tensor:
    """Loss of each row from its log-probs, differentiable in `sums`.

    SFT and unpaired rows: −mean log-prob per token. Pairs: −log σ(β m), where m is the margin of the summed log-probs less
    that of the reference (DPO, arXiv 2305.18290, eq. 7), or, without a reference, the margin of the means (SimPO without γ,
    arXiv 2405.14734, eq. 6).

    Args:
        sums: float [n, sequences], nats.
        reference: float [n, 2], pairs' log-probs under the reference; None for none.
        examples: n rows.
        beta: of pairs.

    Returns:
        float [n].
    """
    if sums.shape[1] == 1:
        return -token_means(sums, examples)
    margin = token_means(sums, examples) if reference is None else difference(sums - reference)
    return -nn.functional.logsigmoid(beta * margin)
