"""`budget: 0.05`: scoring takes at most a share of the training time, and the rows that it scores speak for the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..config import ICAConfig
from ..data.holdout import Holdout
from ..data.store import Rows, Sequence
from ..log import get_logger
from ..policy.engine import Engine
from ..weighting.neighbours import Neighbours, row_features
from ..weighting.retrieval import Embed
from ..weighting.weights import Weights
from .cost import FORWARDS_PER_STEP
from .scoring import Scoring

# Optimizer steps after which their own time is believed rather than the estimate.
STEPS_TO_MEASURE = 5


# Rows are planned to take this share of what is left, since their cost is an estimate.
CAUTION = 0.9


class Budgeted:
    """Scoring within a budget: which rows, for how long, and what weight the others get.

    Args:
        config: the block, with `budget`.
        train: every train row.
        holdout: checked holdout.
        allowance: the time.
        rows_per_step: train rows of an optimizer step on this rank.
        micro_batch: train rows of a micro-batch.
        known: float64 [n], scores of a resumed run; NaN where there are none.
    """

    def __init__(
        self,
        config: ICAConfig,
        train: Rows,
        holdout: Holdout,
        allowance: Allowance,
        rows_per_step: float,
        micro_batch: int,
        known: np.ndarray,
    ):
        self.allowance = allowance
        self.holdout = holdout
        self._known = known
        self._neighbours: Neighbours | None = None
        self._config, self._train, self._scorable = config, train, train.can_be_scored
        self._rows_per_step, self._micro_batch = rows_per_step, micro_batch
        self._row_guess = 0.0
        self._offset = 0
        self._vectors: dict[tuple[bytes, ...], np.ndarray] = {}

    def score(
        self,
        rows: list[int],
        engine: Engine,
        retrieve: Callable[[list[int]], list[list[int]]],
        score: Callable[[list[int]], dict[str, np.ndarray]],
    ) -> dict[str, Any]:
        """Score as many of `rows` as fit, evenly spread; between `allowance.open` and `allowance.close`.

        Args:
            rows: indices of train rows.
            engine: the policy's log-probs.
            retrieve: rows → their demonstrations, found with `holdout` and `embed`.
            score: rows → columns `base`, `context`, `score`; called after `retrieve`.

        Returns:
            columns `row`, `scored`, and `base`, `context`, `score`, NaN where not scored; `demos` {row: demonstrations} of the
            scored rows.
        """
        if self._neighbours is None:
            self._neighbours = self._set_up(engine)
        candidates = np.flatnonzero(self._scorable[rows])
        order = candidates[np.roll(spread(len(candidates)), -self._offset)].tolist()
        found: dict[str, Any] = {name: np.full(len(rows), np.nan) for name in ("base", "context", "score")}
        found |= {"row": np.array(rows, dtype=np.int64), "scored": np.zeros(len(rows), bool), "demos": {}}
        done = 0
        while done < len(order):
            count = min(self.allowance.rows(self._row_guess), len(order) - done)
            if count <= done // 10:  # not worth a pass of its own
                break
            begin = time.monotonic()
            at = sorted(order[done : done + count])
            chosen = [rows[i] for i in at]
            found["demos"].update(zip(chosen, retrieve(chosen), strict=True))
            columns = score(chosen)
            for name in ("base", "context", "score"):
                found[name][at] = columns[name]
            found["scored"][at] = True
            self.allowance.scored(count, time.monotonic() - begin)
            done += count
        self._offset += done
        return found

    def weigh(self, columns: dict[str, np.ndarray], neutral: np.ndarray) -> tuple[Weights, float | None]:
        """Weights of the rows of all ranks' `score`, and how well neighbours predict (see `Neighbours.weigh`); alike on every rank.

        Args:
            columns: `row`, `scored`, `score`.
            neutral: bool, rows that could be shown no demonstration.
        """
        assert self._neighbours is not None, "`score` comes first"
        rows, scored = columns["row"], columns["scored"]
        self._neighbours.add(rows[scored], columns["score"][scored], neutral[scored])
        return self._neighbours.weigh(rows)

    def embed(self, sequences: list[Sequence], embeddings: Embed) -> np.ndarray:
        """`embeddings` of the sequences' prompts, each computed once in a run."""
        keys = [(s.prompt.tobytes(), *(media.digest for _, media in s.media)) for s in sequences]
        new = {key: sequence for key, sequence in zip(keys, sequences, strict=True) if key not in self._vectors}
        if new:
            self._vectors.update(zip(new, embeddings(list(new.values())), strict=True))
        return np.stack([self._vectors[key] for key in keys])

    def _set_up(self, engine: Engine) -> Neighbours:
        rows, allowance = self._train[self._scorable.nonzero()[0]], self.allowance
        sample = [sequence for i in spread(len(rows))[: self._micro_batch] for sequence in rows[i].sequences]
        seconds_per_token = _forward_seconds(engine, sample) / sum(len(s.tokens) for s in sample)
        row_tokens = float(rows.lengths.sum(axis=1).mean())
        allowance.step_seconds = FORWARDS_PER_STEP * seconds_per_token * row_tokens * self._rows_per_step
        shown = self.holdout.shown
        demonstration_tokens = float(np.mean([len(self.holdout.examples[i].demonstration.tokens) for i in shown]))
        context_tokens = self._config.k * demonstration_tokens * rows.lengths.shape[1]
        self._row_guess = max(seconds_per_token * (2 * row_tokens + context_tokens), 1e-9)
        if self._config.retrieval == "policy":
            demonstrations = [self.holdout.examples[i].demonstration for i in shown]
            # A quarter of the time at most goes into choosing demonstrations.
            kept = affordable([each.prompt for each in demonstrations], seconds_per_token, allowance.whole / 4, self._config.k)
            if len(kept) < len(shown):
                get_logger().info(
                    "ica.budget leaves time to look for demonstrations among %d of %d holdout rows.", len(kept), len(shown)
                )
                self.holdout = self.holdout.part([shown[i] for i in kept])
            self.embed([demonstrations[i] for i in kept], engine.embeddings)
        features = row_features(engine.input_embeddings, self._train)
        neighbours = Neighbours(
            features,
            self._train.supervised,
            self._config,
            by_token=self._train.kind == "sft" and self._config.apply == "gradient",
        )
        before = np.flatnonzero(np.isfinite(self._known))
        neighbours.add(before, self._known[before], np.zeros(len(before), bool))
        allowance.set_up()
        if allowance.setup > allowance.whole:
            get_logger().warning(
                "ica.budget: %g of this short run's training time, about %.1f s, is less than the %.1f s that it takes to start; no row "
                "will be scored.",
                self._config.budget,
                allowance.whole,
                allowance.setup,
            )
        return neighbours


class Allowance:
    """How many seconds a refresh may take, so that all of them stay under a share of the training time.

    Training time is measured; before the first steps it is estimated from a forward. What is computed once for the
    whole run (`setup`) is charged evenly over its steps.

    Args:
        share: of the training time.
        first_step: optimizer step at which the run starts (0, or where it was resumed).
        last_step: optimizer step at which it ends.
    """

    def __init__(self, share: float, first_step: int, last_step: int):
        self.share = share
        self.first_step, self.last_step = first_step, last_step
        self.step_seconds = 0.0
        self.setup = 0.0
        self.spent = 0.0
        self._row_seconds = 0.0
        self._rows = 0
        self._after = 0.0
        self._started = time.monotonic()

    def open(self, step: int, until: int) -> None:
        """Start the clock of a refresh before `step`, whose weights serve until `until`."""
        self._opened = self._scored = time.monotonic()
        self._trained = self._opened - self._started - self.spent
        self._step, self._until = step, until
        if step - self.first_step >= STEPS_TO_MEASURE:
            self.step_seconds = self._trained / (step - self.first_step)

    def set_up(self) -> None:
        """What was spent since `open` serves the whole run."""
        self._scored = time.monotonic()
        self.setup = self._scored - self._opened

    @property
    def whole(self) -> float:
        """Seconds for scoring over the whole run."""
        return self.share * self.step_seconds * (self.last_step - self.first_step)

    @property
    def left(self) -> float:
        """Seconds left to this refresh."""
        training = self._trained + self.step_seconds * (self._until - self._step)
        part = (self._until - self.first_step) / max(self.last_step - self.first_step, 1)
        used = self.spent + time.monotonic() - self._opened - self.setup
        return self.share * training - used - self.setup * part

    def rows(self, guess: float) -> int:
        """How many rows to score next; `guess`: seconds per row before any was scored."""
        left = self.left - self._after
        if self._rows == 0:  # a first few to learn what they cost
            return max(int(left / 4 / guess), int(left >= guess))
        return int(CAUTION * left * self._rows / self._row_seconds)

    def scored(self, rows: int, seconds: float) -> None:
        """Learn from `rows` rows that took `seconds`."""
        self._rows += rows
        self._row_seconds += seconds
        self._scored = time.monotonic()

    def close(self) -> None:
        """Stop the clock of the refresh, when all that it does is done: weights are given and files are written.

        What came after the last row was scored is kept back of the next refresh.
        """
        now = time.monotonic()
        self.spent += now - self._opened
        self._after = now - self._scored


def spread(n: int) -> np.ndarray:
    """0 … n − 1 in an order of which every run is spread evenly (multiples of the golden ratio)."""
    return np.argsort(np.argsort((np.arange(n) * (5**0.5 - 1) / 2) % 1, kind="stable"))


def affordable(prompts: list[np.ndarray], seconds_per_token: float, seconds: float, least: int) -> list[int]:
    """Indices of as many prompts, evenly spread, as can be embedded in `seconds`; at least `least`."""
    order = spread(len(prompts))
    cost = np.cumsum([len(prompts[i]) for i in order]) * seconds_per_token
    return sorted(order[: max(least, int((cost <= seconds).sum()))].tolist())


def within_budget(scoring: Scoring, state: Any, loader: Any, known: np.ndarray) -> Budgeted:
    """`Budgeted` for a run that begins.

    Args:
        scoring: of the run.
        state: the trainer's, at the run's first step.
        loader: the trainer's data loader, whose batches may be packed; None where it is not known.
        known: float64 [n], scores of a resumed run; NaN where there are none.
    """
    args, ranks, train = scoring.trainer.args, scoring.trainer.accelerator.num_processes, scoring.train
    rows = len(train) / (len(loader) * ranks) if loader is not None else args.per_device_train_batch_size
    assert scoring.config.budget is not None
    allowance = Allowance(scoring.config.budget, state.global_step, state.max_steps)
    per_step, micro_batch = rows * args.gradient_accumulation_steps, min(args.per_device_train_batch_size, len(train))
    return Budgeted(scoring.config, train, scoring.holdout, allowance, per_step, micro_batch, known)


def _forward_seconds(engine: Engine, rows: list[Sequence]) -> float:
    """Seconds of one padded forward over `rows`, the faster of two: the first may have to warm up."""
    seconds = []
    with engine.undisturbed():
        for _ in range(2):
            begin = time.monotonic()
            engine.padded.token_logprobs(rows)  # its result is on the CPU, so the device has finished
            seconds.append(time.monotonic() - begin)
    return min(seconds)
