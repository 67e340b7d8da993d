"""Seconds of training and of scoring, told apart."""

from __future__ import annotations

import time


class Clock:
    """Counts through several `train()` calls and resumes.

    Attributes:
        scoring_seconds: spent on scoring so far.
    """

    def __init__(self) -> None:
        self.scoring_seconds = 0.0
        self._before = 0.0  # training seconds of earlier `train()` calls, and of the run that this one resumes
        self._started: float | None = None
        self._scored_since = self._seen = 0.0

    def begin(self) -> None:
        """A `train()` call begins, or begins over."""
        if self._started is not None:
            # The call before was broken off: what passed since its last step, as in a notebook overnight, is no training.
            self._before = self._until(self._seen)
        self._started = self._seen = time.monotonic()
        self._scored_since = 0.0

    def step(self) -> None:
        """An optimizer step is done."""
        self._seen = time.monotonic()

    def end(self) -> None:
        """It has ended."""
        self._before = self.training_seconds
        self._started = None

    def scored(self, seconds: float) -> None:
        """That long was spent on scoring, just now."""
        self.scoring_seconds += seconds
        self._scored_since += seconds

    def resume(self, training_seconds: float, scoring_seconds: float) -> None:
        """Take over the seconds of the run that this one goes on with."""
        self._before, self.scoring_seconds = training_seconds, scoring_seconds

    @property
    def training_seconds(self) -> float:
        """Seconds inside `train()` without scoring."""
        return self._until(time.monotonic())

    def _until(self, now: float) -> float:
        if self._started is None:
            return self._before
        return self._before + max(now - self._started - self._scored_since, 0.0)
