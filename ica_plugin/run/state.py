"""What a run knows of its rows: weights, scores, demonstrations, and how many of each it made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ICAError
from .token_weights import TokenWeights


@dataclass
class Counts:
    """Counted over the whole run.

    Attributes:
        refreshes: refreshes done.
        scored_rows: rows scored in them.
        weighted_rows: rows that got a weight in them.
    """

    refreshes: int = 0
    scored_rows: int = 0
    weighted_rows: int = 0


class RowState:
    """The newest of every train row, alike on every rank.

    Args:
        rows: number of train rows.
        given: float64 [rows] weights that replace scoring.

    Attributes:
        weights: float32 [rows]; NaN where a row has none yet.
        scores: float64 [rows]; NaN where a row was never scored.
        refresh: int32 [rows], the refresh that gave each row its weight; −1 where none did.
        draws: int32 [rows], times each row is trained since it was last scored, with `apply: sample`.
        demonstrations: int32 [rows, most], the holdout rows that each row is shown, filled up with −1; None before they were
            looked for.
        tokens: weights of their tokens; None where no token is left out.
        counts: what was done so far.
    """

    def __init__(self, rows: int, given: np.ndarray | None = None):
        self.weights = torch.full((rows,), torch.nan) if given is None else torch.from_numpy(given).float()
        self.scores = torch.full((rows,), torch.nan, dtype=torch.float64)
        self.refresh = torch.full((rows,), -1, dtype=torch.int32)
        self.draws = torch.zeros(rows, dtype=torch.int32)
        self.demonstrations: torch.Tensor | None = None
        self.tokens: TokenWeights | None = None
        self.counts = Counts()

    def __len__(self) -> int:
        return len(self.weights)

    def show(self, rows: list[int], demonstrations: list[list[int]]) -> None:
        """Keep the demonstrations of `rows`."""
        most = max([1, *map(len, demonstrations)])
        before = self.demonstrations
        if before is None or before.shape[1] < most:
            self.demonstrations = torch.full((len(self), most), -1, dtype=torch.int32)
            if before is not None:
                self.demonstrations[:, : before.shape[1]] = before
        assert self.demonstrations is not None
        for row, shown in zip(rows, demonstrations, strict=True):
            self.demonstrations[row] = -1
            self.demonstrations[row, : len(shown)] = torch.tensor(shown, dtype=torch.int32)

    def shown(self, rows: list[int] | np.ndarray) -> list[list[int]]:
        """The demonstrations of `rows`; empty lists where there are none."""
        if self.demonstrations is None:
            return [[] for _ in rows]
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        return [[demo for demo in row if demo >= 0] for row in self.demonstrations[index].tolist()]

    def give(self, rows: np.ndarray, weights: np.ndarray, scored: np.ndarray, scores: np.ndarray) -> None:
        """Take over what a refresh made; it counts as the newest.

        Args:
            rows: int64 [n].
            weights: float64 [n].
            scored: bool [n], rows that were scored themselves.
            scores: float64 [n].
        """
        index = torch.from_numpy(rows)
        self.weights[index] = torch.from_numpy(weights).float()
        self.refresh[index] = self.counts.refreshes
        self.draws[index] = 0
        self.scores[index[scored]] = torch.from_numpy(scores[scored])
        self.counts.scored_rows += int(scored.sum())
        self.counts.weighted_rows += len(rows)

    def newest(self, rows: list[int]) -> bool:
        """Whether every one of `rows` got its weight in the last refresh."""
        return bool((self.refresh[rows] == self.counts.refreshes - 1).all())

    def weights_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The newest weights of a batch.

        Args:
            rows: int64 [B] or [B, T] row ids; padding has a negative id and weight 0.

        Returns:
            float32, same shape.

        Raises:
            ICAError: a row has no weight yet.
        """
        ids = rows.cpu()
        weights = torch.where(ids >= 0, self.weights[ids.clamp(min=0)], torch.zeros(()))
        if torch.isnan(weights).any():
            unknown = ids[torch.isnan(weights)].unique().tolist()
            raise ICAError(f"rows {unknown[:5]} are about to be trained but were never scored; the run stops here.")
        return weights

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, by name."""
        shown = {} if self.demonstrations is None else {"demonstrations": self.demonstrations}
        of_tokens = {} if self.tokens is None else self.tokens.tensors()
        return {"weights": self.weights, "scores": self.scores, "refresh": self.refresh, **shown, **of_tokens}

    def record(self) -> dict[str, Any]:
        """Counters that a checkpoint keeps."""
        return asdict(self.counts)

    def restore(self, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Take over what `tensors` and `record` returned."""
        self.weights, self.scores = tensors["weights"].clone(), tensors["scores"].clone()
        # A checkpoint of an earlier version does not say which refresh gave a weight: then none is the newest.
        self.refresh = tensors["refresh"].clone() if "refresh" in tensors else torch.full_like(self.refresh, -1)
        if "demonstrations" in tensors:
            self.demonstrations = tensors["demonstrations"].clone()
        if self.tokens is not None:
            self.tokens.restore(tensors)
        self.counts = Counts(**{name: record[name] for name in asdict(self.counts)})
