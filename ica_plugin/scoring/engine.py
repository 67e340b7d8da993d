"""Log-probs and pooled hidden states under the policy, without gradient and without a trace on training."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from ..examples import Sequence

Progress = Callable[[int], None]


class Engine:
    """Padded batches sorted by length, each token scored once.

    Args:
        model: the policy, without distributed wrappers (PEFT is fine).
        device: where inputs go.
        autocast: makes the context of the trainer's own precision.
        batch_tokens: padded tokens per forward; halved whenever memory runs out.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        batch_tokens: int = 8192,
    ):
        self.model = model
        self.device = device
        self.autocast = autocast
        self.batch_tokens = batch_tokens
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder = base.get_decoder()
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters

    def logprobs(self, sequences: list[Sequence], progress: Progress = lambda done: None) -> np.ndarray:
        """Summed log-prob of each sequence's scored tokens.

        Args:
            sequences: n sequences.
            progress: called with the number of sequences done.

        Returns:
            float64 [n], nats.
        """
        result = np.zeros(len(sequences))
        with evaluating(self.model), self.autocast():
            self._in_batches([len(s.tokens) for s in sequences], lambda index: self._logprobs(sequences, index, result), progress)
        return result

    def embeddings(self, prompts: list[np.ndarray], progress: Progress = lambda done: None) -> np.ndarray:
        """Position-weighted mean of the last hidden states of each prompt (position t has weight t, from 1, so that
        later tokens, which have seen more, count more: as in SGPT, arXiv 2202.08904).

        Args:
            prompts: n token arrays.

        Returns:
            float32 [n, H].
        """
        result: list[np.ndarray | None] = [None] * len(prompts)
        with evaluating(self.model), self.autocast():
            self._in_batches([len(p) for p in prompts], lambda index: self._embeddings(prompts, index, result), progress)
        return np.stack(result)

    def _in_batches(self, lengths: list[int], run: Callable[[list[int]], None], progress: Progress) -> None:
        pending = [list(batch) for batch in _batches(lengths, self.batch_tokens)]
        while pending:
            batch = pending.pop(0)
            try:
                run(batch)
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.batch_tokens = max(1, self.batch_tokens // 2)
                torch.cuda.empty_cache()
                middle = len(batch) // 2
                pending[:0] = [batch[:middle], batch[middle:]]
                continue
            progress(len(batch))

    def _logprobs(self, sequences: list[Sequence], index: list[int], result: np.ndarray) -> None:
        batch = [sequences[i] for i in index]
        tokens, attention = _pad([s.tokens for s in batch], self.device)
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        for i, sequence in enumerate(batch):
            scored[i, : len(sequence.scored)] = torch.from_numpy(sequence.scored)
        columns = torch.nonzero(scored.any(dim=0)).squeeze(1)
        if len(columns) == 0:
            return
        keep = {"logits_to_keep": columns - 1} if self._keeps_logits else {}
        logits = self.model(input_ids=tokens, attention_mask=attention, use_cache=False, **keep).logits
        if not self._keeps_logits:
            logits = logits[:, columns - 1]
        for i, row in enumerate(index):
            kept = scored[i, columns]
            labels = tokens[i, columns][kept]
            values = logits[i][kept].float()
            picked = values.gather(1, labels[:, None]).squeeze(1)
            result[row] = float((picked - torch.logsumexp(values, dim=1)).double().sum())

    def _embeddings(self, prompts: list[np.ndarray], index: list[int], result: list) -> None:
        tokens, attention = _pad([prompts[i] for i in index], self.device)
        hidden = self._decoder(input_ids=tokens, attention_mask=attention, use_cache=False)
        weight = attention.cumsum(dim=1) * attention
        pooled = (hidden.last_hidden_state.float() * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True)
        for i, vector in zip(index, pooled.cpu().numpy(), strict=True):
            result[i] = vector


def _batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices sorted by length, longest first, in batches of at most `batch_tokens` padded tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pad(rows: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded tokens and attention mask, both int64 [B, T]."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(row)
        attention[i, : len(row)] = 1
    return tokens.to(device), attention.to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; every module's own mode and all random states are put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)
