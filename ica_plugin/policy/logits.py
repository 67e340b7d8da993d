"""Logits → log-probs of labels, in float32 and in bounded memory."""

from __future__ import annotations

import torch

CHUNK_ELEMENTS = 2**24


def label_logprobs(logits: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-prob of each label under one row of logits; a row may be asked for several labels.

    Args:
        logits: [P, V], any float type.
        rows: int64 [N], the row of `logits` that predicts each label.
        labels: int64 [N].

    Returns:
        float32 [N]. No more than 64 MB of logits are in float32 at once.
    """
    step = max(1, CHUNK_ELEMENTS // logits.shape[1])
    normaliser = torch.cat([torch.logsumexp(part.float(), dim=1) for part in logits.split(step)])
    return logits[rows, labels].float() - normaliser[rows]
