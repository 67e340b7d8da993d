"""What a refresh does: rows are scored on all ranks, weighed together, kept, written and reported."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from ..scorers import CONTRACT_COLUMNS, balanced_score, weight_shares
from ..scorers.combine import without_spread
from ..weighting.retrieval import report_fewer
from ..weighting.weights import Weights, weights_from_scores
from .budget import Budgeted
from .clock import Clock
from .files import RunFiles
from .parts import Parts
from .ranks import Ranks
from .report import Refreshed, Report
from .scoring import Scoring
from .state import RowState
from .tokens import TokenDropping

Columns = dict[str, np.ndarray]


class Refresh:
    """Scores rows with the current policy and gives them new weights.

    Args:
        scoring: of the run.
        state: what is known of the rows; gets the new weights.
        ranks: the run's processes.
        clock: gets the seconds.
        files: get the scores.
        report: tells people.

    Attributes:
        budgeted: scoring within a budget, where the block asks for it; there from the start of training on.
        neighbour_correlation: how well scored rows speak for the others, with a budget.
        dropping: leaves tokens out of the loss, where the block asks for it.
        parts: keep the finished blocks of the scoring of all rows before the first step, where there are any.
    """

    def __init__(self, scoring: Scoring, state: RowState, ranks: Ranks, clock: Clock, files: RunFiles, report: Report):
        self.scoring, self.state, self.files = scoring, state, files
        self.budgeted: Budgeted | None = None
        self.neighbour_correlation: float | None = None
        self.parts: Parts | None = None
        self.dropping = TokenDropping(scoring, ranks, report) if scoring.config.drop_tokens is not None else None
        state.tokens = None if self.dropping is None else self.dropping.weights
        self.tokens = scoring.train.supervised
        self._ranks, self._clock, self._report = ranks, clock, report

    def __call__(self, rows: list[int], *, shared: bool, until: int = 0) -> None:
        """Refresh; collective over all ranks.

        Args:
            rows: indices of train rows.
            shared: every rank passes the same rows and scores its share; otherwise each rank passes its own.
            until: optimizer step until which the weights serve, for `budget`.
        """
        begin = time.monotonic()
        if self.budgeted is not None:
            self.budgeted.allowance.open(self.scoring.trainer.state.global_step, until)
        first = shared and self.scoring.trainer.state.global_step == 0 and self.state.counts.refreshes == 0
        parts = self.parts if first and self.budgeted is None else None
        with self.scoring.averaged_weights_kept():
            if parts is not None:
                parts.begin()
            columns = self._score(self._ranks.share(rows) if shared else rows, parts)
        weights = self._weigh(columns) if len(columns["row"]) else None
        if weights is not None:
            dropped = None
            if self.dropping is not None:
                dropped = self.dropping(columns, weights.values, self.state.counts.scored_rows)
            self.state.give(columns["row"], weights.values, columns["scored"], columns["score"])
            if self._ranks.is_main:
                self.files.add_scores(self._written(columns, weights, dropped))
        # The clocks stop last: what is written is a part of the cost.
        if self.budgeted is not None:
            self.budgeted.allowance.close()
        seconds = time.monotonic() - begin
        self._clock.scored(seconds)
        if weights is not None:
            self._tell(columns, weights, seconds)
            self.state.counts.refreshes += 1

    def _score(self, mine: list[int], kept: Parts | None) -> Columns:
        """The columns of all ranks' rows, each row once and in order."""
        if self.budgeted is None:
            self._find_demonstrations(kept)
        parts = self._ranks.all(lambda: self._score_all(mine, kept) if self.budgeted is None else self._score_within_budget(mine))
        if self.budgeted is not None:
            for part in parts:
                shown: Any = part.pop("demos")
                self.state.show(list(shown), list(shown.values()))
        index, first = np.unique(np.concatenate([part["row"] for part in parts]), return_index=True)
        if len(index) == 0:
            return {"row": index}
        columns = {name: np.concatenate([part[name] for part in parts])[first] for name in parts[0]}
        if self.budgeted is None:
            columns["score"] = balanced_score(self.scoring.config, columns)
        columns.setdefault("scored", np.ones(len(index), bool))
        return columns

    def _find_demonstrations(self, kept: Parts | None) -> None:
        """For all rows, once in a run: each rank looks for its share."""
        if self.state.demonstrations is not None:
            return
        rows, config = list(range(len(self.state))), self.scoring.config
        shares = self._ranks.all(lambda: self._demonstrations_of(self._ranks.share(rows), kept))
        found = self._ranks.joined(shares, len(rows))
        self.state.show(rows, found)
        if config.shows_demonstrations:
            report_fewer(found, config.k, len(self.scoring.holdout.shown))

    def _demonstrations_of(self, rows: list[int], kept: Parts | None) -> list[list[int]]:
        found = {} if kept is None else kept.demonstrations(rows)
        for block, shown in self.scoring.demonstration_blocks([row for row in rows if row not in found]):
            if kept is not None and any(shown):
                kept.add("demonstrations", {"row": block, "demos": shown})
            found.update(zip(block, shown, strict=True))
        return [found[row] for row in rows]

    def _score_all(self, rows: list[int], kept: Parts | None = None) -> Columns:
        return self.scoring.score(rows, self.state.shown(rows), kept)

    def _score_within_budget(self, rows: list[int]) -> dict[str, Any]:
        budgeted, scoring = self.budgeted, self.scoring
        assert budgeted is not None

        def retrieve(chosen: list[int]) -> list[list[int]]:
            embed = partial(budgeted.embed, embeddings=scoring.engine.embeddings)
            found = scoring.find_demonstrations(chosen, holdout=budgeted.holdout, embed=embed)
            self.state.show(chosen, found)
            return found

        def score(chosen: list[int]) -> Columns:
            columns = self._score_all(chosen)
            return {**columns, "score": columns["ica"]}

        return budgeted.score(rows, scoring.engine, retrieve, score)

    def _weigh(self, columns: Columns) -> Weights:
        rows, config = columns["row"], self.scoring.config
        shows = config.shows_demonstrations
        neutral = np.array([shows and not shown for shown in self.state.shown(rows)])
        if self.budgeted is None:
            return weights_from_scores(
                columns["score"], config, tokens=self.tokens[rows], by_token=self.scoring.by_token, neutral=neutral, rows=rows
            )
        weights, self.neighbour_correlation = self.budgeted.weigh(columns, neutral)
        return weights

    def _written(self, columns: Columns, weights: Weights, dropped: list[np.ndarray] | None = None) -> dict[str, Any]:
        """The columns of scores.parquet."""
        rows, scored = columns["row"], columns["scored"]
        further: dict[str, Any] = {
            name: column for name, column in columns.items() if name not in CONTRACT_COLUMNS and column is not columns["score"]
        }
        if dropped is not None:
            further["dropped_tokens"] = dropped
        return {
            "row": rows,
            "refresh": np.full(len(rows), self.state.counts.refreshes),
            "step": np.full(len(rows), self.scoring.trainer.state.global_step),
            "base_logprob": columns["base"],
            "context_logprob": columns["context"],
            "score": columns["score"],
            "weight": weights.values,
            "tokens": self.tokens[rows],
            "draws": np.full(len(rows), 0 if self.scoring.config.apply == "sample" else 1),
            "demos": [shown if now else [] for shown, now in zip(self.state.shown(rows), scored, strict=True)],
            **further,
        }

    def record_given(self) -> None:
        """Write given weights where scores would be, so that it can be seen how often each row is drawn."""
        rows = np.arange(len(self.state))
        nothing = np.full(len(rows), np.nan)
        values = self.state.weights.double().numpy()
        columns = {"row": rows, "base": nothing, "context": nothing, "score": nothing, "scored": np.zeros(len(rows), bool)}
        written = self._written(columns, Weights(values, np.zeros(len(rows), bool), np.zeros(len(rows), bool)))
        # A resumed run writes what it wrote when it began.
        self.files.add_scores({**written, "step": np.zeros(len(rows), int), "draws": self.state.draws.numpy()})

    def _tell(self, columns: Columns, weights: Weights, seconds: float) -> None:
        counts, clock = self.state.counts, self._clock
        overhead = clock.scoring_seconds / max(clock.training_seconds, 1e-9) if counts.refreshes else 0.0
        scored = int(columns["scored"].sum())
        flat = without_spread({name: columns[name] for name in columns if name == "score" or name not in CONTRACT_COLUMNS})
        shares = weight_shares(self.scoring.config, columns, weights.values)
        self._report.refreshed(
            Refreshed(counts.refreshes, columns["row"], columns["score"], flat, scored, weights, seconds, overhead, shares)
        )
        if self.budgeted is not None:
            self._report.within_budget(scored, len(columns["row"]), self.neighbour_correlation)
