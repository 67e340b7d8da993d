"""What one run asks of its policy: demonstrations for rows, and their scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import Trainer

from ..config import ICAConfig
from ..data.holdout import Holdout
from ..data.store import Rows
from ..policy.engine import Engine
from ..policy.memory import budget_for
from ..policy.model import model_context
from ..policy.reference import reference_of
from ..scorers import scores_for_sets
from ..scorers.context import ScoringContext
from ..weighting.retrieval import Embed, retrieve


class Scoring:
    """Scores of train rows under the policy as it is at the time of the call.

    Args:
        trainer: the host's, whose model, precision, optimizer and tokenizer count.
        config: the block.
        train: every train row.
        holdout: checked holdout.
        length_normalize: mean log-probs for pairs.
    """

    def __init__(self, trainer: Trainer, config: ICAConfig, train: Rows, holdout: Holdout, length_normalize: bool):
        self.trainer, self.config, self.train, self.holdout = trainer, config, train, holdout
        self.length_normalize = length_normalize
        self._engine: Engine | None = None
        self._kept: dict[str, Any] = {}  # what scorers keep between refreshes

    @property
    def by_token(self) -> bool:
        """Whether weights have mean 1 over supervised tokens, as a token-mean loss needs it, or over rows, as drawing does."""
        return self.train.kind == "sft" and self.config.apply == "gradient"

    @property
    def engine(self) -> Engine:
        """The policy's log-probs."""
        if self._engine is None:
            args, model = self.trainer.args, self.trainer.model
            largest = int(self.train.lengths.sum(axis=1).max())
            self._engine = Engine(
                model,
                device=args.device,
                autocast=self.trainer.accelerator.autocast,
                budget=budget_for(model.config, args.device, args.per_device_train_batch_size * largest),
            )
        return self._engine

    def follow_model(self) -> bool:
        """Forget what was of another model, where the trainer has made a new one (`model_init`). Returns whether it has."""
        if self._engine is None or self._engine.model is self.trainer.model:
            return False
        self._engine, self._kept = None, {}
        return True

    def use_training_weights(self) -> None:
        """A schedule-free optimizer leaves its averaged weights in the model after an evaluation, until the next step. What is
        scored are the weights that are trained, whenever a refresh comes."""
        switch = getattr(self.trainer.optimizer, "train", None)
        if callable(switch):
            switch()

    def find_demonstrations(
        self,
        rows: list[int],
        config: ICAConfig | None = None,
        holdout: Holdout | None = None,
        embed: Embed | None = None,
    ) -> list[list[int]]:
        """Indices of the holdout rows that each train row is shown, k of each set.

        Args:
            rows: indices of train rows.
            config: with another choice of demonstrations than the run's.
            holdout: to look among other rows than the run's.
            embed: another way to the policy's pooled hidden states than the engine's.
        """
        config, holdout = config or self.config, holdout or self.holdout
        if not config.shows_demonstrations:
            return [[] for _ in rows]
        tokenizer = self.trainer.processing_class
        of_sets = [
            retrieve(
                self.train,
                holdout.only(name),
                config,
                rows=rows,
                context=model_context(self.trainer.model),
                embed=embed or self.engine.embeddings,
                decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
            )
            for name in holdout.sets
        ]
        return [sum(of_row, []) for of_row in zip(*of_sets, strict=True)]

    def score(self, rows: list[int], demonstrations: list[list[int]]) -> dict[str, np.ndarray]:
        """The columns of `scorers.scores_for_sets` for `rows`, with a bar on the local main process, and `row`."""
        sequences = 2 * self.train.lengths.shape[1] * int(self.train.can_be_scored[rows].sum())
        with tqdm(
            total=sequences if self.config.score == "ica" else None,
            desc="ICA scoring",
            unit="seq",
            leave=False,
            disable=self.trainer.args.disable_tqdm or not self.trainer.is_local_process_zero(),
        ) as bar:
            scores = scores_for_sets(self.context(rows, demonstrations, bar.update))
        return {"row": np.array(rows, dtype=np.int64), **scores}

    def context(
        self, rows: list[int], demonstrations: list[list[int]], progress: Callable[[int], Any] = lambda done: None
    ) -> ScoringContext:
        """What scorers see, for `rows` of the train set and the demonstrations of each."""
        return ScoringContext(
            engine=self.engine,
            config=self.config,
            train=self.train,
            rows=rows,
            demonstrations=demonstrations,
            holdout=self.holdout,
            length_normalize=self.length_normalize,
            reference=reference_of(self.trainer),
            beta=float(getattr(self.trainer, "beta", None) or getattr(self.trainer.args, "beta", None) or 0.1),
            limit=model_context(self.trainer.model),
            optimizer=self.trainer.optimizer,
            kept=self._kept,
            progress=progress,
        )
