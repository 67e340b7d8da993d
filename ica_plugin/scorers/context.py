"""What a scorer gets to see, and what scorers share."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..config import ICAConfig
from ..data.holdout import Holdout
from ..data.store import Example, Kind, Sequence
from ..policy.engine import Engine, Progress
from ..policy.gradients import RowReference, row_gradients
from ..policy.reference import Reference
from .in_context import Scores, beginning, ica_scores


@dataclass
class ScoringContext:
    """One scoring of n rows with the policy as it is now.

    Log-probs that several scorers need are computed once.

    Attributes:
        engine: the policy's log-probs.
        config: the block.
        train: every train row.
        rows: the n rows to score, indices into `train`.
        demonstrations: for each of `rows`, indices into `holdout.examples`; empty lists where no scorer shows any.
        holdout: checked holdout.
        length_normalize: mean log-probs for pairs.
        reference: the run's reference model.
        beta: of the run's preference loss.
        limit: the model's context in tokens; None if unlimited.
        optimizer: of the run, once there is one.
        parts: names of the scorers computed together.
        kept: what a scorer keeps from one refresh to the next.
        once: what a scorer keeps from one block of rows to the next of the same refresh.
        progress: called with the number of tokens done.
    """

    engine: Engine
    config: ICAConfig
    train: SequenceOf[Example]
    rows: list[int]
    demonstrations: list[list[int]]
    holdout: Holdout
    length_normalize: bool
    reference: Reference = Reference()
    beta: float = 0.1
    limit: int | None = None
    optimizer: Any = None
    parts: list[str] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    once: dict[str, Any] = field(default_factory=dict)
    progress: Progress = lambda done: None

    @cached_property
    def examples(self) -> list[Example]:
        """The rows to score, each up to the last token that counts (`score_tokens`)."""
        return [self.beginning(row) for row in self.whole]

    @property
    def whole(self) -> list[Example]:
        """The rows to score as they are, for what is not about log-probs of their tokens."""
        return [self.train[row] for row in self.rows]

    def beginning(self, example: Example) -> Example:
        """The part of any row that is scored; see `in_context.beginning`."""
        return beginning(example, self.config.score_tokens)

    @property
    def kind(self) -> Kind:
        """Kind of every row of the run: sft, pair or unpaired."""
        return self.train[0].kind

    @property
    def shown(self) -> list[Example]:
        """The holdout rows that count: with a supervised token, and desirable."""
        return [self.holdout.examples[i] for i in self.holdout.shown]

    @cached_property
    def sign(self) -> np.ndarray:
        """float64 [n]; −1 for undesirable unpaired rows, which are better the less likely they are, else 1."""
        return np.array([1.0 if row.desirable else -1.0 for row in self.examples])

    @cached_property
    def ica(self) -> Scores:
        """ICA scores of the rows."""
        return ica_scores(
            self.engine,
            self.examples,
            self.demonstrations,
            self.holdout.examples,
            length_normalize=self.length_normalize,
            progress=self.progress,
            keep_tokens=self.config.drop_tokens is not None,
        )

    @cached_property
    def sums(self) -> np.ndarray:
        """float64 [n, sequences]: summed log-prob of each sequence under the policy; NaN for rows that cannot be scored."""
        return self.ica.sums if "ica" in self.parts else self.logprob_sums(self.examples)

    @cached_property
    def reference_sums(self) -> np.ndarray:
        """The same under the run's reference."""
        with self.reference.engine(self.engine) as engine:
            return self.logprob_sums(self.examples, engine)

    @property
    def loss_has_reference(self) -> bool:
        """Whether the loss of a row, as `policy.losses` has it, compares with the reference."""
        return self.kind == "pair" and not self.length_normalize

    def loss_references(self, examples: list[Example]) -> list[RowReference]:
        """What `policy.gradients` takes as the reference of each of `examples`."""
        if not self.loss_has_reference:
            return [None] * len(examples)
        with self.reference.engine(self.engine) as engine:
            return list(self.logprob_sums(examples, engine))

    def row_gradients(self, examples: list[Example]) -> Iterator[list[torch.Tensor] | None]:
        """Gradients of the rows' losses: see `policy.gradients.row_gradients`."""
        references = self.loss_references(examples)
        return row_gradients(self.engine, examples, references, beta=self.beta, progress=self.progress)

    def logprob_sums(self, examples: list[Example], engine: Engine | None = None) -> np.ndarray:
        """float64 [len(examples), sequences]: the same for any rows, under a model as it is at the time of the call.

        Args:
            examples: any rows of the run's kind.
            engine: of the model; default: the policy.
        """
        engine = engine or self.engine
        scored = [i for i, row in enumerate(examples) if row.can_be_scored]
        flat: list[Sequence] = [sequence for i in scored for sequence in examples[i].sequences]
        result = np.full((len(examples), 2 if self.kind == "pair" else 1), np.nan)
        if flat:
            result[scored] = engine.logprobs(flat, self.progress).reshape(len(scored), -1)
        return result
