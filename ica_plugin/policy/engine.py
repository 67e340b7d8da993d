"""Log-probs and pooled hidden states under the policy, without gradient and without a trace on training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from ..data.store import Sequence
from ..errors import ICAError
from ..log import get_logger
from .memory import Budget, budget_for
from .packed import PackedPath, why_not_packed
from .padded import PaddedPath
from .precision import evaluating

Progress = Callable[[int], None]


Path = PaddedPath | PackedPath


# Packed and padded log-probs may differ by this share of their own spread: rounding is far below, a sibling seen far above.
PATHS_AGREE = 0.05


class Engine:
    """The policy's log-probs, by the fastest path that is right for the model.

    On first use the packed path is tried against the padded one on a few random tokens; a model on which they differ
    is scored by the padded path. Which path is taken, and why, is logged once.

    Args:
        model: the policy, without distributed wrappers (PEFT is fine).
        device: where inputs go.
        autocast: makes the context of the trainer's own precision.
        budget: bounds of one forward, halved whenever memory runs out; default: of a training step on 4,096 tokens.

    Attributes:
        model: the policy.
        device: where inputs go.

    Raises:
        ICAError: prompt tuning, whose virtual tokens stand before every row.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        budget: Budget | None = None,
    ):
        adapter = getattr(model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise ICAError(
                f"{adapter.peft_type.value} adapters are not supported by ica_plugin: their virtual tokens stand before every row. Use LoRA."
            )
        self.model = model
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = torch.device(device)
        self._autocast = autocast
        self.budget = budget or budget_for(self._base.config, self.device, 4096)
        self._chosen: Path | None = None

    @property
    def input_embeddings(self) -> nn.Module:
        """The policy's input embedding."""
        return self._base.get_input_embeddings()

    @property
    def path(self) -> Path:
        """The path taken for this model."""
        if self._chosen is None:
            with self._scoring():
                self._chosen, why = self._choose()
            name = (
                "padded batches sorted by length"
                if isinstance(self._chosen, PaddedPath)
                else f"packed trees ({'dense mask' if self._chosen.attention == 'dense' else 'attention by segments'}, SDPA)"
            )
            get_logger().info(
                "scoring path: %s, at most %d tokens per forward%s.", name, self.budget.tokens, f", since {why}" if why else ""
            )
        return self._chosen

    def logprobs(self, sequences: list[Sequence], progress: Progress = lambda done: None) -> np.ndarray:
        """Summed log-prob of each sequence's scored tokens.

        Args:
            sequences: n sequences.
            progress: called with the number of sequences done.

        Returns:
            float64 [n], nats.

        Raises:
            ICAError: a single sequence does not fit the memory.
        """
        result = np.zeros(len(sequences))
        path = self.path

        def work(index: list[int]) -> None:
            values = path.token_logprobs([sequences[i] for i in index])
            result[index] = [float(value.astype(np.float64).sum()) for value in values]
            if len(index) > 1:
                # A NaN reaches its neighbours in the forward through masked attention, as 0 × NaN: each row by itself.
                for i in np.array(index)[~np.isfinite(result[index])]:
                    result[i] = path.token_logprobs([sequences[i]])[0].astype(np.float64).sum()

        self._in_batches([s.tokens for s in sequences], np.array([int(s.scored.sum()) for s in sequences]), work, progress)
        return result

    def embeddings(self, prompts: list[np.ndarray], progress: Progress = lambda done: None) -> np.ndarray:
        """Position-weighted mean of the last hidden states of each prompt (position t has weight t, from 1, so that
        later tokens, which have seen more, count more: as in SGPT, arXiv 2202.08904).

        Args:
            prompts: n token arrays.
            progress: called with the number of prompts done.

        Returns:
            float32 [n, H].
        """
        result: list[np.ndarray | None] = [None] * len(prompts)
        path = self.path

        def work(index: list[int]) -> None:
            for i, vector in zip(index, path.embeddings([prompts[i] for i in index]), strict=True):
                result[i] = vector

        self._in_batches(prompts, np.zeros(len(prompts), int), work, progress)
        return np.stack(result)

    def forward_seconds(self, rows: list[Sequence]) -> float:
        """Seconds of one padded forward over `rows`, the faster of two: the first may have to warm up."""
        padded = PaddedPath(self.model, self._base, self.device)
        seconds = []
        with self._scoring():
            for _ in range(2):
                begin = time.monotonic()
                padded.token_logprobs(rows)  # its result is on the CPU, so the device has finished
                seconds.append(time.monotonic() - begin)
        return min(seconds)

    def _in_batches(
        self, sequences: list[np.ndarray], predictions: np.ndarray, work: Callable[[list[int]], None], progress: Progress
    ) -> None:
        def plan(index: list[int]) -> deque[list[int]]:
            batches = self.path.split([sequences[i] for i in index], predictions[index], self.budget)
            return deque([index[i] for i in batch] for batch in batches)

        batches = plan(list(range(len(sequences))))
        with self._scoring():
            while batches:
                try:
                    work(batches[0])
                except torch.OutOfMemoryError:
                    ran_out = True
                else:
                    ran_out = False
                if ran_out:  # outside of `except`, whose traceback would keep the tensors
                    self._halve([len(sequences[i]) for i in batches[0]])
                    batches = plan([i for batch in batches for i in batch])
                    continue
                progress(len(batches.popleft()))

    def _halve(self, lengths: list[int]) -> None:
        if len(lengths) == 1:
            raise ICAError(
                f"out of memory while scoring a single row of {lengths[0]} tokens with its demonstrations. Lower `ica.k`, "
                "use shorter holdout rows, or shorten the run's sequence length."
            )
        self.budget = self.budget.halved(sum(lengths))
        torch.cuda.empty_cache()
        get_logger().warning("out of memory while scoring; at most %d tokens per forward from here on.", self.budget.tokens)

    def _choose(self) -> tuple[Path, str | None]:
        padded = PaddedPath(self.model, self._base, self.device)
        reason = why_not_packed(self._base)
        if reason is not None:
            return padded, reason
        probe = _probe(self._base.config.get_text_config().vocab_size)
        expected = np.concatenate(padded.token_logprobs(probe))
        # Dense attention is one kernel, which is what a GPU wants; on a CPU the fewest operations win.
        for attention in ("segments", "dense") if self.device.type == "cpu" else ("dense",):
            packed = PackedPath(self.model, self._base, self.device, attention)
            try:
                error = np.concatenate(packed.token_logprobs(probe)) - expected
            except Exception as caught:
                reason = f"its forward does not take packed trees ({type(caught).__name__}: {caught})"
                continue
            if np.sqrt(np.mean(error**2)) <= PATHS_AGREE * expected.std():
                return packed, None
            reason = "its log-probs of packed trees differ from those of single rows"
        return padded, reason

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        with self.undisturbed():
            yield

    @contextmanager
    def undisturbed(self, gradient: bool = False) -> Iterator[None]:
        """Eval mode under the trainer's precision; training notices nothing of it, as under `evaluating`."""
        with evaluating(self.model, gradient), self._autocast():
            yield
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _probe(vocabulary: int) -> list[Sequence]:
    """Sequences of random tokens, sorted: two that share a beginning, a third that shares nothing."""
    rng = np.random.default_rng(0)
    stem, left, right, alone = (rng.integers(vocabulary, size=size) for size in (12, 8, 8, 16))
    rows = sorted([np.concatenate([stem, left]), np.concatenate([stem, right]), alone], key=lambda row: row.tolist())
    return [Sequence(row, np.arange(len(row)) > 0) for row in rows]
