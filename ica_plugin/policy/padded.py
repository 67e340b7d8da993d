"""The plain path: padded batches sorted by length, for every model, and the reference for the packed path."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.media import joined_tensors
from ..data.store import Sequence
from .decoder import decoder_of
from .logits import label_logprobs
from .memory import Budget
from .precision import Autocast, one_forward


class PaddedPath:
    """Right-padded batches, nothing shared.

    Args:
        model: the policy.
        base: the policy without PEFT's wrapper.
        device: where inputs go. Logits and hidden states may come back on another one (a model over several GPUs), so what
            indexes them is made on the CPU and follows them.
        autocast: makes the context of the run's precision.
    """

    def __init__(self, model: nn.Module, base: nn.Module, device: torch.device, autocast: Autocast = nullcontext):
        self._model = model
        self._autocast = autocast
        self._decoder = decoder_of(base)
        self._device = device
        self._config = base.config
        takes = inspect.signature(base.forward).parameters
        self._keeps_logits = "logits_to_keep" in takes
        self._takes_types = "mm_token_type_ids" in takes

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
        return [values.cpu().numpy() for values in self.label_logprobs(sequences)]

    def label_logprobs(self, sequences: list[Sequence]) -> list[torch.Tensor]:
        """The same as tensors where the logits are, differentiable while gradients are on."""
        tokens, attention = _pad([s.tokens for s in sequences])
        scored = torch.zeros(tokens.shape, dtype=torch.bool)
        for line, sequence in zip(scored, sequences, strict=True):
            line[: len(sequence.scored)] = torch.tensor(sequence.scored)
        columns = torch.nonzero(scored.any(dim=0)).squeeze(1)
        if len(columns) == 0:
            return [torch.zeros(0)] * len(sequences)
        keep = {"logits_to_keep": columns - 1} if self._keeps_logits else {}
        logits = self._forward(self._model, tokens, attention, **self._media(sequences, tokens), **keep).logits
        if not self._keeps_logits:
            logits = logits[:, columns.to(logits.device) - 1]
        values = []
        for i in range(len(sequences)):
            kept = torch.nonzero(scored[i, columns]).squeeze(1)
            values.append(label_logprobs(logits[i], kept.to(logits.device), tokens[i, columns[kept]].to(logits.device)))
        return values

    def embeddings(self, sequences: list[Sequence]) -> np.ndarray:
        """float32 [n, H]: see `Engine.embeddings`."""
        tokens, attention = _pad([s.tokens if s.media else s.prompt for s in sequences])
        media = self._media(sequences, tokens)
        hidden = self._last_hidden_state(tokens, attention, media).float()
        pooled_over = torch.arange(tokens.shape[1])[None] < torch.tensor([[len(s.prompt)] for s in sequences])
        weight = (attention.cumsum(dim=1) * pooled_over).float().to(hidden.device)
        # A product and a sum: a matrix product would be in half precision within an autocast region of the caller's.
        pooled = (weight[..., None] * hidden).sum(1) / weight.sum(1, keepdim=True)
        return pooled.cpu().numpy()

    def _last_hidden_state(self, tokens: torch.Tensor, attention: torch.Tensor, media: dict[str, torch.Tensor]) -> torch.Tensor:
        if not media:
            return self._forward(self._decoder, tokens, attention).last_hidden_state
        # The decoder alone sees no image: the whole model runs, and what comes out of its decoder is taken.
        seen: list[torch.Tensor] = []
        handle = self._decoder.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        keep = {"logits_to_keep": 1} if self._keeps_logits else {}
        try:
            self._forward(self._model, tokens, attention, **media, **keep)
        finally:
            handle.remove()
        return seen[-1]

    def _media(self, sequences: list[Sequence], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a forward over these sequences, padded to `tokens` [B, T], takes beside tokens; empty for text."""
        media = joined_tensors([s.media for s in sequences], tokens.shape[1])
        if media and self._takes_types and "mm_token_type_ids" not in media:
            # LLaMA-Factory gives positions in their place, which do not hold behind demonstrations.
            types = torch.zeros_like(tokens)
            for kind, name in ((1, "image_token_id"), (2, "video_token_id")):
                if (token := getattr(self._config, name, None)) is not None:
                    types[tokens == token] = kind
            media["mm_token_type_ids"] = types
        return {key: value.to(self._device) for key, value in media.items()}

    def _forward(self, module: nn.Module, tokens: torch.Tensor, attention: torch.Tensor, **kwargs: Any) -> Any:
        inputs = {"input_ids": tokens.to(self._device), "attention_mask": attention.to(self._device)}
        with one_forward(self._autocast):
            return module(**inputs, use_cache=False, **kwargs)


def _pad(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded tokens and attention mask, both int64 [B, T] on the CPU."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        attention[i, : len(row)] = 1
    return tokens, attention
