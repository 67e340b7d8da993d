"""Before each optimizer step: refresh if one is due, and hand on its micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import Trainer

from ..log import get_logger
from .drawing import Drawing
from .look_ahead import LookAhead
from .ranks import Ranks
from .refresh import Refresh
from .report import Report
from .schedule import Schedule
from .state import RowState


class BeforeUpdate:
    """What the trainer passes through before it takes the micro-batches of its next step.

    Args:
        trainer: the host's.
        schedule: says when.
        refresh: scores and weighs.
        state: tells which rows were scored.
        ranks: the run's processes.
        report: tells people.
        drawing: draws the rows, where they are drawn.
    """

    def __init__(
        self,
        trainer: Trainer,
        schedule: Schedule,
        refresh: Refresh,
        state: RowState,
        ranks: Ranks,
        report: Report,
        drawing: Drawing | None = None,
    ):
        self._trainer, self._schedule, self._refresh = trainer, schedule, refresh
        self._state, self._ranks, self._report, self._drawing = state, ranks, report, drawing
        self._ahead = LookAhead(trainer.accelerator.gradient_state, trainer.args.device)

    def begin_epoch(self) -> None:
        """Forget what was drawn ahead: an epoch has batches of its own."""
        self._ahead.clear()
        if self._drawing is not None:
            self._drawing.begin_epoch()
        self._schedule.begin_epoch()

    def __call__(self, batches: Iterator[dict], micro_batches: int) -> Iterator[dict]:
        """Refresh if one is due.

        With `refresh_scope: window` the batches of the coming interval are drawn ahead and exactly their rows are
        scored; the batches are handed on unchanged and in order.

        Args:
            batches: the trainer's epoch iterator.
            micro_batches: micro-batches per optimizer step.

        Returns:
            The iterator to take the micro-batches from.
        """
        if self._drawing is not None and self._drawing.by_window:
            return self._drawing.window(batches, self._until)
        step, schedule = self._trainer.state.global_step, self._schedule
        if schedule.unsure:
            self._compare(batches, schedule.steps_to_come(step) * micro_batches)
        if schedule.take(step):
            until = self._until(step)
            if schedule.by_window:
                steps = schedule.steps_to_come(step)
                self._ahead.draw(batches, steps * micro_batches)
                if self._state.counts.refreshes == 0 and steps == schedule.interval:
                    self._report.small_window(len(self._ahead.rows) * self._ranks.count, len(self._state))
                self._refresh(self._ahead.rows, shared=False, until=until)
            else:
                self._refresh(list(range(len(self._state))), shared=True, until=until)
        return self._ahead.hand_on(batches) if self._ahead else batches

    def _until(self, step: int) -> int:
        return self._schedule.serves_until(step, self._trainer.args.num_train_epochs)

    def _compare(self, batches: Iterator[dict], count: int) -> None:
        """Resumed inside a window: its rows to come must be those that the last refresh scored, or they are scored now.

        Another seed, batch size, number of epochs or of processes moves them, so the rows themselves are looked at.
        """
        self._schedule.unsure = False
        self._ahead.draw(batches, count)
        if self._ranks.any(not self._state.newest(self._ahead.rows)):
            get_logger().warning("the rows to come are not those that were scored before the checkpoint: they are scored anew.")
            self._schedule.due = True
