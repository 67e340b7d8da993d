"""`apply: sample` in a run: when rows are drawn, how often each was, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from ..config import ICAConfig
from ..errors import ICAError
from ..log import get_logger
from ..training.places import Places
from ..training.windows import Windows
from .files import RunFiles
from .ranks import Ranks
from .refresh import Refresh
from .report import Report
from .schedule import Schedule
from .state import RowState


class Drawing:
    """Draws the rows of each epoch or window by their newest weights.

    Args:
        trainer: the host's.
        config: `candidates`, `epoch_share`, `seed`, `refresh_interval`, `refresh_scope`.
        state: has the weights.
        schedule: says when rows are scored.
        refresh: scores them.
        ranks: the run's processes.
        report: tells people.

    Attributes:
        ever: bool [rows], rows that were drawn at least once in the run.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: ICAConfig,
        state: RowState,
        schedule: Schedule,
        refresh: Refresh,
        ranks: Ranks,
        report: Report,
    ):
        self._trainer, self._config, self._state = trainer, config, state
        self._schedule, self._refresh, self._ranks, self._report = schedule, refresh, ranks, report
        self.ever = torch.zeros(len(state), dtype=torch.bool)
        self._windows: Windows | None = None
        self._places: Places | None = None
        self._last_epoch: int | None = None

    @property
    def by_window(self) -> bool:
        """Whether rows are drawn window by window."""
        return self._windows is not None

    @property
    def places(self) -> Places:
        """What stands under the run's loader; there from the start of training on."""
        if self._places is None:
            raise ICAError("a training step ran outside `trainer.train()`, before any row was drawn.")
        return self._places

    @property
    def _files(self) -> RunFiles:
        return self._refresh.files

    def under(self, loader: Any) -> Any:
        """The host's train loader, whose rows will be drawn."""
        Places.under(loader, share=self._config.epoch_share, seed=self._config.seed)
        return loader

    def begin(self, loader: Any, scores: bool) -> None:
        """Training begins.

        Args:
            loader: the run's, as `under` left it.
            scores: the run scores its rows, rather than train with given weights.

        Raises:
            ICAError: rows cannot be drawn under that loader.
        """
        self._places, self._last_epoch = getattr(loader, "ica_places", None), None
        if self._places is None:
            raise ICAError(
                "`apply: sample` cannot draw rows under this trainer's data loader, which has no batch sampler of its own on every rank "
                "(`dispatch_batches: true`, or a loader of another kind). Set `apply: gradient` in the `ica:` block."
            )
        self._state.draws.zero_()
        self.ever.zero_()
        by_window = scores and self._schedule.interval is not None
        self._windows = Windows(self._places, self._config.candidates) if by_window else None
        self._places.begin(lambda: self._state.weights.double().numpy(), self._count, by_window=by_window)

    def begin_epoch(self) -> None:
        """An epoch begins, or goes on."""
        # As the host counts them, whose epoch is not in its state.
        args, state = self._trainer.args, self._trainer.state
        accumulation, last = args.gradient_accumulation_steps, state.max_steps - state.global_step
        updates = max(-(-self.places.micro_batches // accumulation), 1)
        done = 0
        if self._last_epoch is None:
            self._last_epoch = state.global_step // updates - 1
            done = 0 if args.ignore_data_skip else state.global_step % updates * accumulation
        self._last_epoch += 1
        if self._windows is None:
            self.places.begin_epoch(self._last_epoch, last=done + last * accumulation)
        else:
            self._windows.begin_epoch(self._last_epoch, done=done, last=done + last * accumulation)

    def window(self, batches: Iterator[dict], until: Callable[[int], int]) -> Iterator[dict]:
        """Before an optimizer step: score and draw a window if one begins.

        Args:
            batches: the trainer's epoch iterator.
            until: optimizer step → the step until which weights given before it serve.

        Returns:
            the window's batches that are still to come.
        """
        windows, schedule, step = self._windows, self._schedule, self._trainer.state.global_step
        assert windows is not None
        windows.follow(batches)
        if windows.at_end:
            return iter(())
        due = schedule.take(step)
        if due or windows.needs_one:
            everything = self._config.refresh_scope == "all"
            # A window that a resumed run begins in the middle of an interval ends with it.
            steps = max(schedule.steps_to_come(step), 1)
            rows = windows.candidates(steps * self._trainer.args.gradient_accumulation_steps, step, rest=everything)
            if not due and not self._state.newest(rows):
                get_logger().warning(
                    "the rows to come are not those that were scored before the checkpoint: they are scored anew."
                )
                due = True
            if due:
                if self._state.counts.refreshes == 0:
                    self._report.small_window(len(rows), len(self._state))
                self._refresh(list(range(len(self._state))) if everything else rows, shared=True, until=until(step))
            windows.draw()
        return windows.hand_on(self._trainer.args.device, self._trainer.accelerator.gradient_state)

    def check(self, rows: torch.Tensor) -> None:
        """Raise ICAError where a batch about to be trained holds a row that was never scored, or that was not drawn."""
        self._state.weights_of(rows)
        self.places.check(rows[rows >= 0].cpu().numpy())

    def _count(self, rows: np.ndarray) -> None:
        """Rows that an epoch or window will train, each as often as it will be."""
        counts = np.bincount(rows, minlength=len(self._state)).astype(np.int32)
        self._state.draws += torch.from_numpy(counts)
        self.ever |= torch.from_numpy(counts > 0)
        self._report.drawn(counts)
        if self._ranks.is_main:
            draws, refresh = self._state.draws.numpy(), self._state.refresh.numpy()
            self._files.set_draws(draws)
            # What accelerate repeats of an epoch's beginning was scored in an earlier window.
            earlier = np.flatnonzero((counts > 0) & (refresh != self._state.counts.refreshes - 1))
            for number in np.unique(refresh[earlier]).tolist():
                self._files.set_draws_of(number, earlier[refresh[earlier] == number], draws)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, by name."""
        return {**self.places.state(), "draws": self._state.draws, "drawn_ever": self.ever}

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON types."""
        windows = self._windows
        at = {} if windows is None else {"position": windows.position, "until": windows.until}
        return {"places": {"epoch": self.places.epoch, "shape": self._shape(), **at}}

    def restore(self, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Take over what `tensors` and `record` returned; to be called after `begin`."""
        if "draws" not in tensors:
            return
        self._state.draws, self.ever = tensors["draws"].clone(), tensors["drawn_ever"].clone()
        places = record["places"]
        if self._trainer.args.ignore_data_skip or "places.rows" not in tensors:
            return
        if places["shape"] != self._shape():
            get_logger().warning(
                "another number of batches, processes or steps than in the checkpoint (then %s, now %s): the rest of the epoch is drawn anew.",
                places["shape"],
                self._shape(),
            )
            return
        self.places.resume(tensors, places["epoch"])
        if self._windows is not None:
            self._windows.position, self._windows.until = places["position"], places["until"]

    def _shape(self) -> list[int]:
        """What decides which batch of the plan a step trains: sizes, sharding, accumulation."""
        places, args = self.places, self._trainer.args
        return [len(places), args.train_batch_size, places.ranks, places.together, args.gradient_accumulation_steps]
