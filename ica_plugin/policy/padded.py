"""The plain path: padded batches sorted by length, for every model, and the reference for the packed path."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from torch import nn

from ..data.store import Sequence
from .decoder import decoder_of
from .logits import label_logprobs
from .memory import Budget


class PaddedPath:
    """Right-padded batches, nothing shared.

    Args:
        model: the policy.
        base: the policy without PEFT's wrapper.
        device: where inputs go.
    """

    def __init__(self, model: nn.Module, base: nn.Module, device: torch.device):
        self._model = model
        self._decoder = decoder_of(base)
        self._device = device
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters

    def split(self, sequences: list[np.ndarray], predictions: np.ndarray, budget: Budget) -> list[list[int]]:
        """Indices sorted by length, longest first, in batches of at most `budget.tokens` padded tokens.

        A batch computes logits at the same positions of all of its rows, at most those from the first scored one on;
        `budget.predictions` bounds the sum of the rows' own, which is close to it for rows of one length.
        """
        batches: list[list[int]] = []
        positions = 0
        for index in sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i)):
            positions += int(predictions[index])
            full = not batches or (len(batches[-1]) + 1) * len(sequences[batches[-1][0]]) > budget.tokens
            if full or positions > budget.predictions:
                batches.append([])
                positions = int(predictions[index])
            batches[-1].append(index)
        return batches

    def token_logprobs(self, sequences: list[Sequence]) -> list[np.ndarray]:
        """float32 [scored tokens] log-probs of each sequence's scored tokens."""
        tokens, attention = _pad([s.tokens for s in sequences], self._device)
        scored = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, sequence in enumerate(sequences):
            scored[i, : len(sequence.scored)] = torch.from_numpy(sequence.scored)
        scored = scored.to(self._device)
        columns = torch.nonzero(scored.any(dim=0)).squeeze(1)
        if len(columns) == 0:
            return [np.zeros(0, np.float32)] * len(sequences)
        keep = {"logits_to_keep": columns - 1} if self._keeps_logits else {}
        logits = self._model(input_ids=tokens, attention_mask=attention, use_cache=False, **keep).logits.to(self._device)
        if not self._keeps_logits:
            logits = logits[:, columns - 1]
        values = []
        for i in range(len(sequences)):
            kept = torch.nonzero(scored[i, columns]).squeeze(1)
            values.append(label_logprobs(logits[i], kept, tokens[i, columns[kept]]).cpu().numpy())
        return values

    def embeddings(self, prompts: list[np.ndarray]) -> np.ndarray:
        """float32 [n, H]: see `Engine.embeddings`."""
        tokens, attention = _pad(prompts, self._device)
        hidden = self._decoder(input_ids=tokens, attention_mask=attention, use_cache=False).last_hidden_state.to(self._device)
        weight = (attention.cumsum(dim=1) * attention).float()
        # A product and a sum, since autocast would take a matrix product in half precision.
        pooled = (weight[..., None] * hidden.float()).sum(1) / weight.sum(1, keepdim=True)
        return pooled.cpu().numpy()


def _pad(rows: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded tokens and attention mask, both int64 [B, T]."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(row)
        attention[i, : len(row)] = 1
    return tokens.to(device), attention.to(device)
