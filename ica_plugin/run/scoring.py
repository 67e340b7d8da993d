"""What one run asks of its policy: demonstrations for rows, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from transformers import Trainer

from ..config import ICAConfig
from ..data.holdout import Holdout
from ..data.store import Rows
from ..expression import parse_score, parts_of
from ..log import get_logger
from ..policy.engine import Engine
from ..policy.gradients import trained_parameters
from ..policy.memory import budget_for
from ..policy.model import model_context
from ..policy.reference import reference_of
from ..scorers import needs_of, scores_for_sets
from ..scorers.context import ScoringContext
from ..weighting.retrieval import Embed, retrieve_blocks
from .cost import watched
from .fingerprint import digest, fingerprint
from .parts import Parts

# Tokens of a block, which is scored and kept as one: minutes on a CPU, and hundreds of rows that share demonstrations.
TOKENS_PER_BLOCK = 1 << 18

# So many rows tell one policy from another by their log-probs.
PROBED_ROWS = 4

# Keys of the block that act on scores that are there already: they may change, and nothing is scored again.
AFTER_SCORING = {
    "apply",
    "balance",
    "candidates",
    "combine",
    "epoch_share",
    "keep",
    "max_weight",
    "refresh_interval",
    "refresh_scope",
    "temperature",
    "weighting",
    "winsorize",
}


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

    def facts(self) -> dict[str, Any]:
        """What scores before the first step depend on: `fingerprint`, and by a few log-probs the policy as it is.

        Log-probs and not weights, since a fresh LoRA is drawn anew at every start and changes nothing. Scorers with gradients do
        see it, so for them the trained weights count themselves.
        """
        train, model = self.train, self.trainer.model
        facts = fingerprint(self.config, train, self.holdout, None, model)
        facts["block"] = {key: value for key, value in facts["block"].items() if key not in AFTER_SCORING}
        if any(need.gradients for need in needs_of(parts_of(parse_score(self.config.score))).values()):
            facts["model"] += " " + digest(p.detach().float().cpu().numpy().tobytes().hex() for p in trained_parameters(model))
        probed = np.flatnonzero(train.can_be_scored)[:PROBED_ROWS]
        sequences = [sequence for row in probed for sequence in train[int(row)].sequences]
        return {**facts, "logprobs": self.engine.logprobs(sequences).tolist()}

    @property
    def engine(self) -> Engine:
        """The policy's log-probs, by the weights that are trained."""
        self._use_training_weights()
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

    def _use_training_weights(self) -> None:
        """A schedule-free optimizer leaves its averaged weights in the model after an evaluation, until the next step. What is
        scored are the weights that are trained, whoever asks and whenever."""
        switch = getattr(self.trainer.optimizer, "train", None)
        if callable(switch):
            switch()

    @contextmanager
    def averaged_weights_kept(self) -> Iterator[None]:
        """After the block the model has the averaged weights again, if it had: they are what is saved after training."""
        optimizer = self.trainer.optimizer
        averaged = any(group.get("train_mode") is False for group in getattr(optimizer, "param_groups", ()))
        try:
            yield
        finally:
            if averaged and callable(getattr(optimizer, "eval", None)):
                optimizer.eval()

    def find_demonstrations(
        self,
        rows: list[int],
        config: ICAConfig | None = None,
        holdout: Holdout | None = None,
        embed: Embed | None = None,
        train: Rows | None = None,
    ) -> list[list[int]]:
        """`demonstration_blocks`, all at once."""
        return [of_row for _, shown in self.demonstration_blocks(rows, config, holdout, embed, train) for of_row in shown]

    def demonstration_blocks(
        self,
        rows: list[int],
        config: ICAConfig | None = None,
        holdout: Holdout | None = None,
        embed: Embed | None = None,
        train: Rows | None = None,
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Some of `rows` at a time, in order, with the indices of the holdout rows that each of them is shown, k of each set.

        Args:
            rows: indices of train rows.
            config: with another choice of demonstrations than the run's.
            holdout: to look among other rows than the run's.
            embed: another way to the policy's pooled hidden states than the engine's.
            train: other rows than the run's, which `rows` are indices of.
        """
        config, holdout = config or self.config, holdout or self.holdout
        if not config.needs_demonstrations:
            yield rows, [[] for _ in rows]
            return
        tokenizer = self.trainer.processing_class
        of_sets = [
            retrieve_blocks(
                self.train if train is None else train,
                holdout.only(name),
                config,
                rows=rows,
                context=model_context(self.trainer.model),
                embed=embed or self.engine.embeddings,
                decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
            )
            for name in holdout.sets
        ]
        for blocks in zip(*of_sets, strict=True):
            yield blocks[0][0], [sum(of_row, []) for of_row in zip(*(shown for _, shown in blocks), strict=True)]

    def score(self, rows: list[int], demonstrations: list[list[int]], parts: Parts | None = None) -> dict[str, np.ndarray]:
        """The columns of `scorers.scores_for_sets` for `rows` and `row`; see `cost.watched` for what is seen of it.

        Args:
            rows: indices of train rows.
            demonstrations: of each.
            parts: where finished blocks are kept; what is there already is not scored again.
        """
        columns: dict[str, np.ndarray] = {}
        done = np.zeros(len(rows), bool)
        once: dict[str, Any] = {}

        def take(at: np.ndarray, block: dict[str, np.ndarray]) -> None:
            for name, values in block.items():
                columns.setdefault(name, np.empty(len(rows), values.dtype))[at] = values
            done[at] = True

        before = {} if parts is None else parts.scores(rows)
        if before:
            place = {row: i for i, row in enumerate(rows)}
            take(np.array([place[row] for row in before["row"].tolist()]), before)
            get_logger().info("%d of %d rows were scored before this scoring was stopped; it goes on.", done.sum(), len(rows))
        left = np.flatnonzero(~done).tolist()
        todo = [rows[i] for i in left], [demonstrations[i] for i in left]
        with watched(self.trainer, self.config, self.train, self.holdout, *todo) as progress:
            for block in blocks(self.train, self.holdout, rows, demonstrations):
                at = block[~done[block]]
                if len(at) == 0 and columns:
                    continue
                some = [rows[i] for i in at]
                context = self.context(some, [demonstrations[i] for i in at], progress, once)
                found = {"row": np.array(some, np.int64), **scores_for_sets(context)}
                if parts is not None and some:
                    parts.add("scores", found)
                take(at, found)
        return columns

    def context(
        self,
        rows: list[int],
        demonstrations: list[list[int]],
        progress: Callable[[int], Any] = lambda done: None,
        once: dict[str, Any] | None = None,
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
            once={} if once is None else once,
            progress=progress,
        )


def blocks(train: Rows, holdout: Holdout, rows: list[int], demonstrations: list[list[int]]) -> list[np.ndarray]:
    """Places in `rows` of blocks of about TOKENS_PER_BLOCK; at least one, which may be empty.

    Rows with the same first demonstrations next to each other: they share that part of the forward.
    """
    lengths, sides = train.lengths[rows].sum(axis=1), train.lengths.shape[1]
    shown = np.array([row.demonstration.tokens.size for row in holdout.examples])
    tokens = [2 * n + sides * int(shown[demos].sum()) for n, demos in zip(lengths.tolist(), demonstrations, strict=True)]
    order = np.array(sorted(range(len(rows)), key=demonstrations.__getitem__), int)
    block_of = np.cumsum(np.array(tokens, int)[order]) // TOKENS_PER_BLOCK
    return [np.sort(at) for at in np.split(order, np.flatnonzero(np.diff(block_of)) + 1)]
