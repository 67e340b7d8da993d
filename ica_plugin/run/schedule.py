"""When rows are scored."""

from __future__ import annotations

from typing import Any

from ..config import ICAConfig


class Schedule:
    """The trainer's events go in; whether a refresh is due comes out.

    Args:
        config: `refresh_interval`, `refresh_scope`.
        scores: whether the run scores at all; it does not with given weights.

    Attributes:
        due: a refresh comes before the next optimizer step.
        interval: optimizer steps between refreshes; None where they are not counted in steps.
        last_step: optimizer step of the newest refresh.
        unsure: resumed inside a window, whose rows to come are still to be compared with those that were scored.
    """

    def __init__(self, config: ICAConfig, scores: bool):
        self._config, self._scores = config, scores
        self.due = self.unsure = False
        self.interval: int | None = None
        self.last_step = 0
        self._total = 0
        self._mid_epoch = False

    @property
    def by_window(self) -> bool:
        """Whether a refresh scores the rows of the coming interval, and no others."""
        return self.interval is not None and self._config.refresh_scope == "window"

    def begin(self, total_steps: int) -> None:
        """Training begins: the first refresh is due."""
        self._total, self.interval = total_steps, self._config.interval_steps(total_steps)
        self.due, self.unsure, self._mid_epoch = self._scores, False, False

    def resume(self, record: dict[str, Any], mid_epoch: bool) -> None:
        """Go on where `record` was made.

        Args:
            record: of `record`, and the optimizer step at which it was made.
            mid_epoch: an epoch goes on, rather than that one begins.
        """
        self.last_step, self.due, self._mid_epoch = record["last_refresh_step"], record["due"], mid_epoch
        self.end_step(record["step"])  # the interval may be another than it was
        self.unsure = self.by_window and not self.due and self._scores

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"due": self.due, "last_refresh_step": self.last_step}

    def begin_epoch(self) -> None:
        """An epoch begins; a resumed one does not begin anew."""
        if self._mid_epoch:
            self._mid_epoch = False
        elif self._config.refresh_interval == "epoch" or self.by_window:
            self.due, self.unsure = self._scores, False

    def end_step(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if self.interval and step - self.last_step >= self.interval:
            self.due = self._scores

    def take(self, step: int) -> bool:
        """Whether to refresh now, before `step`; asked once."""
        if not self.due:
            return False
        self.due = self.unsure = False
        self.last_step = step
        return True

    def steps_to_come(self, step: int) -> int:
        """Optimizer steps from `step` on that the window in which it lies still has."""
        assert self.interval is not None
        return min(self.interval - (step - self.last_step), self._total - step)

    def serves_until(self, step: int, epochs: float) -> int:
        """Optimizer step at which weights given before `step` are renewed.

        Args:
            step: now.
            epochs: of the whole run.
        """
        if self.interval is not None:
            steps = self.steps_to_come(step) if self.by_window else self.interval
        elif self._config.refresh_interval == "epoch" and epochs > 1:
            steps = round(self._total / epochs)
        else:
            steps = self._total
        return min(step + steps, self._total)
