"""Log-probs and pooled hidden states under the policy, without gradient and without a trace on training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.store import Sequence
from ..errors import ICAError
from ..log import get_logger
from .memory import Budget, budget_for, is_out_of_memory
from .padded import PaddedPath
from .paths import Path, choose_path, describe
from .precision import Autocast, checkpointed_layers, checkpointing, empty_caches, evaluating

Progress = Callable[[int], None]

# So many sequences drawn at random that are all NaN leave no doubt: with half of them sound it happens once in 256 times.
BROKEN_AFTER = 8


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
        padded: the padded path, whichever is taken: the one that gives gradients too.
        budget: bounds of one forward from now on.

    Raises:
        ICAError: prompt tuning, whose virtual tokens stand before every row.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        autocast: Autocast = nullcontext,
        budget: Budget | None = None,
    ):
        adapter = getattr(model, "active_peft_config", None)
        if adapter is not None and getattr(adapter, "is_prompt_learning", False):
            raise ICAError(
                f"{adapter.peft_type.value} adapters are not supported by ica_plugin: their virtual tokens stand before every row. Use LoRA."
            )
        self.model = model
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = torch.device(device)
        self._autocast = autocast
        self.padded = PaddedPath(model, self._base, self.device, autocast)
        self.budget = budget or budget_for(self._base.config, self.device, 4096)
        self._chosen: Path | None = None
        self._layers: list[GradientCheckpointingLayer] | None = None  # within `undisturbed`: those that checkpoint
        self._beside: dict[nn.Module, Engine] = {}

    @property
    def input_embeddings(self) -> nn.Module:
        """The policy's input embedding."""
        return self._base.get_input_embeddings()

    @property
    def path(self) -> Path:
        """The path taken for this model."""
        if self._chosen is None:
            with self.undisturbed():
                self._chosen, why = choose_path(self.model, self._base, self.device, self._autocast, self.padded)
            get_logger().info(
                "scoring path: %s, at most %d tokens per forward%s.",
                describe(self._chosen),
                self.budget.tokens,
                f", since {why}" if why else "",
            )
        return self._chosen

    def path_for(self, sequences: list[Sequence]) -> Path:
        """The path of these sequences: the padded one where any shows images, which trees know nothing of."""
        path = self.path  # looks at the model too
        return self.padded if any(sequence.media for sequence in sequences) else path

    def logprobs(
        self, sequences: list[Sequence], progress: Progress = lambda done: None, tokens: list[np.ndarray] | None = None
    ) -> np.ndarray:
        """Summed log-prob of each sequence's scored tokens.

        Args:
            sequences: n sequences.
            progress: called with the number of their tokens done.
            tokens: if given, becomes the log-probs of each sequence's scored tokens one by one, float32 [scored tokens].

        Returns:
            float64 [n], nats.

        Raises:
            ICAError: a single sequence does not fit the memory.
        """
        result = np.zeros(len(sequences))
        path, whole = self.path_for(sequences), True
        if tokens is not None:
            tokens[:] = [np.zeros(0, np.float32)] * len(sequences)

        def sums(index: list[int]) -> list[float]:
            values = path.token_logprobs([sequences[i] for i in index])
            if tokens is not None:
                for i, value in zip(index, values, strict=True):
                    tokens[i] = value.astype(np.float32)
            return [float(value.astype(np.float64).sum()) for value in values]

        def work(index: list[int]) -> None:
            nonlocal whole
            result[index] = sums(index)
            bad = np.array(index)[~np.isfinite(result[index])]
            if whole and len(bad) == len(index):
                stop_if_broken(len(sequences), sums)
                whole = False  # asked once
            if len(index) > 1:
                # A NaN reaches its neighbours in the forward through masked attention, as 0 × NaN: each row by itself.
                for i in bad:
                    result[[i]] = sums([i])

        predictions = np.array([int(s.scored.sum()) for s in sequences])
        self._in_batches(path, [s.tokens for s in sequences], predictions, work, progress)
        return result

    def embeddings(self, sequences: list[Sequence], progress: Progress = lambda done: None) -> np.ndarray:
        """Position-weighted mean of the last hidden states of each sequence's prompt (position t has weight t, from 1, so that
        later tokens, which have seen more, count more: as in SGPT, arXiv 2202.08904).

        Args:
            sequences: n sequences; one of which nothing is scored is all prompt.
            progress: called with the number of their tokens done.

        Returns:
            float32 [n, H].
        """
        result: list[np.ndarray] = [np.empty(0)] * len(sequences)
        path = self.path_for(sequences)
        # Images may stand behind the prompt: such a row is seen whole, and its prompt alone is pooled.
        seen = [s.tokens if s.media else s.prompt for s in sequences]

        def work(index: list[int]) -> None:
            for i, vector in zip(index, path.embeddings([sequences[i] for i in index]), strict=True):
                result[i] = vector

        self._in_batches(path, seen, np.zeros(len(sequences), int), work, progress)
        return np.stack(result)

    def beside(self, model: nn.Module) -> Engine:
        """An engine of another model (a reference) under the same precision and bounds, where that model is; kept with this one."""
        if model not in self._beside:
            device = next(model.parameters()).device
            self._beside[model] = Engine(model, device=device, autocast=self._autocast, budget=self.budget)
        return self._beside[model]

    def _in_batches(
        self,
        path: Path,
        sequences: list[np.ndarray],
        predictions: np.ndarray,
        work: Callable[[list[int]], None],
        progress: Progress,
    ) -> None:
        def plan(index: list[int]) -> deque[list[int]]:
            batches = path.split([sequences[i] for i in index], predictions[index], self.budget)
            return deque([index[i] for i in batch] for batch in batches)

        batches = plan(list(range(len(sequences))))
        with self.undisturbed():
            while batches:
                ran_out = False
                try:
                    work(batches[0])
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    ran_out = True
                if ran_out:  # outside of `except`, whose traceback would keep the tensors
                    self._halve([len(sequences[i]) for i in batches[0]])
                    batches = plan([i for batch in batches for i in batch])
                    continue
                progress(sum(len(sequences[i]) for i in batches.popleft()))

    def _halve(self, lengths: list[int]) -> None:
        if len(lengths) == 1:
            raise ICAError(
                f"out of memory while scoring a single row of {lengths[0]} tokens with its demonstrations. Lower `ica.k`, "
                "use shorter holdout rows, or shorten the run's sequence length."
            )
        self.budget = self.budget.halved(sum(lengths))
        empty_caches()
        get_logger().warning("out of memory while scoring; at most %d tokens per forward from here on.", self.budget.tokens)

    @contextmanager
    def undisturbed(self, gradient: bool = False) -> Iterator[None]:
        """Eval mode; training notices nothing of it, as under `evaluating`. Blocks may stand in each other.

        Modes and random states are switched by the outermost block alone, so that a scoring pays for them once.

        Args:
            gradient: with gradients, and with the run's gradient checkpointing if it has any.
        """
        with ExitStack() as inside:
            if self._layers is None:
                self._layers = checkpointed_layers(self.model)
                inside.callback(setattr, self, "_layers", None)
                inside.callback(empty_caches)
                inside.enter_context(evaluating(self.model))
            if gradient:
                inside.enter_context(checkpointing(self._layers))
            with torch.set_grad_enabled(gradient):
                yield


def stop_if_broken(n: int, sums: Callable[[list[int]], list[float]]) -> None:
    """Raise ICAError where a few of n sequences from all over, each by itself, have no finite log-prob: none will.

    Args:
        n: sequences that are scored.
        sums: indices → their log-probs.
    """
    some = np.random.default_rng(0).permutation(n)[:BROKEN_AFTER]
    if n < BROKEN_AFTER or any(np.isfinite(sums([i])[0]) for i in some):
        return
    raise ICAError(
        f"the log-probs of a whole batch, and of {BROKEN_AFTER} of {n} sequences each by itself, are NaN or infinite, which means that "
        "the policy itself is broken. Check the loss of the plain run: a learning rate too high and float16 overflow are the "
        "usual causes."
    )
