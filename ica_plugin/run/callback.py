"""The trainer's events → the parts of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from ..config import ICAConfig
from ..data.holdout import Holdout
from ..data.store import Rows
from ..training.wrap import Hooks
from .applying import Applying
from .budget import within_budget
from .checkpoint import Checkpoints
from .clock import Clock
from .drawing import Drawing
from .files import RunFiles
from .fingerprint import fingerprint
from .parts import Parts
from .ranks import Ranks
from .record import run_record
from .refresh import Refresh
from .report import Report
from .schedule import Schedule
from .scoring import Scoring
from .state import RowState
from .update import BeforeUpdate


class ICACallback(TrainerCallback):
    """One run: weights for the trainer's rows, renewed when they are due.

    Args:
        trainer: the host's.
        config: the block, without `auto`.
        train: every row of `trainer.train_dataset`, in its order.
        holdout: checked holdout; empty with given weights.
        given: float64 [n] weights that replace scoring.
        length_normalize: mean log-probs for pairs.

    Attributes:
        scoring: what is asked of the policy.
        state: weights, scores and demonstrations of the rows.
        refresh: scores rows and gives them weights.
        drawing: draws rows by weight; None where gradients are scaled.
        hooks: what is hooked on the trainer.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: ICAConfig,
        train: Rows,
        holdout: Holdout,
        *,
        given: np.ndarray | None,
        length_normalize: bool,
    ):
        self.trainer, self.config, self.train, self.holdout = trainer, config, train, holdout
        self.ranks, self.clock = Ranks(trainer.accelerator), Clock()
        self.schedule, self.state = Schedule(config, scores=given is None), RowState(len(train), given)
        self.scoring = Scoring(trainer, config, train, holdout, length_normalize)
        self.hooks: Hooks | None = None
        self._report = Report(trainer, config)
        self.refresh = Refresh(self.scoring, self.state, self.ranks, self.clock, RunFiles(trainer.args.output_dir), self._report)
        self.drawing = (
            Drawing(trainer, config, self.state, self.schedule, self.refresh, self.ranks, self._report)
            if config.apply == "sample"
            else None
        )
        self.checkpoints = Checkpoints(
            config,
            self.ranks,
            self.state,
            self.schedule,
            self.clock,
            self.drawing,
            lambda: fingerprint(config, train, holdout, given, trainer.model),
        )
        self._before_update = BeforeUpdate(
            trainer, self.schedule, self.refresh, self.state, self.ranks, self._report, self.drawing
        )
        self._given = given is not None
        self._parts = self.refresh.parts = self.parts_in(self.files.folder / "unfinished")
        self._applying = Applying(trainer, self.state, self.drawing, self.state.tokens)

    @property
    def weights(self) -> torch.Tensor:
        """float32 [rows]: the newest weight of every train row; NaN where it has none yet."""
        return self.state.weights

    @property
    def scores(self) -> torch.Tensor:
        """float64 [rows]: the newest score of every train row; NaN where it has none."""
        return self.state.scores

    @property
    def files(self) -> RunFiles:
        """Where scores are written."""
        return self.refresh.files

    def parts_in(self, folder: Path) -> Parts:
        """What keeps the finished blocks of the scoring before the first step."""
        return Parts(folder, self.ranks, self.scoring.facts, self.config.on_resume_mismatch)

    # The trainer's events.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.scoring.follow_model():
            self.state.demonstrations = None
        if self.state.tokens is not None:
            self.state.tokens.limit = float("nan")  # of the policy as it was
        self.clock.begin()
        self.schedule.begin(state.max_steps)
        self._applying.begin(kwargs.get("train_dataloader"), scores=not self._given)
        # A checkpoint at an epoch's end goes on with the next one, and so does a run that skips no data.
        resumed = self.checkpoints.resume(mid_epoch=state.epoch % 1 > 0 and not args.ignore_data_skip)
        if self._given:
            self._report.given(self.weights.double().numpy())
            if self.drawing is not None and self.ranks.is_main:
                self.refresh.record_given()
            return
        if resumed and self.ranks.is_main:
            self.files.keep_scores(self.state.counts.refreshes)
        if self.config.budget is not None:
            known = self.state.scores.numpy()
            self.refresh.budgeted = within_budget(self.scoring, state, kwargs.get("train_dataloader"), known)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before_update.begin_epoch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._applying.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.end_step(state.global_step)
        self.clock.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.end()
        if self.ranks.is_main:
            self.files.merge()
        self._parts.remove()
        self._write_run()
        self._applying.end()
        if self.hooks is not None:
            self.hooks.remove()

    # What the hooks on the trainer call.

    def before_update(self, batches: Iterator[dict], micro_batches: int) -> Iterator[dict]:
        """See `BeforeUpdate`; what was done is written down."""
        refreshes = self.state.counts.refreshes
        batches = self._before_update(batches, micro_batches)
        if self.state.counts.refreshes > refreshes:
            self._write_run()
        return batches

    def under(self, loader: Any) -> Any:
        """The host's train loader, under which rows are drawn if they are."""
        return loader if self.drawing is None else self.drawing.under(loader)

    def applied(self, rows: torch.Tensor, inputs: Any) -> AbstractContextManager[None]:
        """See `Applying`."""
        return self._applying(rows, inputs)

    def save_state(self, folder: str) -> None:
        """Write what a resumed run needs into a checkpoint's folder."""
        if self.trainer.args.should_save:
            self.checkpoints.save(folder, self.trainer.state.global_step)

    def load_state(self, folder: str) -> None:
        """See `Checkpoints.load`."""
        self.checkpoints.load(folder)

    def _write_run(self) -> None:
        if self.ranks.is_main:
            self.files.write_run(run_record(self.refresh, self.clock, self.drawing))
