"""What a checkpoint keeps, so that a resumed run goes on with the very weights of the run that was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config import ICAConfig
from ..errors import ICAError
from ..log import get_logger
from .clock import Clock
from .drawing import Drawing
from .fingerprint import differences
from .ranks import Ranks
from .schedule import Schedule
from .state import RowState

STATE_FILE = "ica_state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What is kept.

    Attributes:
        tensors: weights, scores and demonstrations, by name.
        record: counters and the fingerprint, as JSON types.
    """

    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]

    def save(self, folder: str | os.PathLike) -> None:
        """Write it into a checkpoint's folder, whole or not at all.

        A full disk is reported and the run goes on: resuming from that checkpoint scores the rows again.
        """
        path = Path(folder) / STATE_FILE
        partial = path.with_name(f".{STATE_FILE}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.tensors, partial, metadata={"record": json.dumps(self.record)})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            get_logger().warning(
                "%s could not be written (%s). Training goes on; a run resumed from this checkpoint scores its rows again.",
                path,
                error,
            )

    @staticmethod
    def load(folder: str | os.PathLike) -> Checkpoint | None:
        """Read what a checkpoint's folder holds; None if it holds nothing of ours.

        Raises:
            ICAError: a damaged file.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["record"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ICAError(
                f"{path} is damaged ({error}). Resume from an earlier checkpoint, or delete the file to score the rows again."
            ) from error


class Checkpoints:
    """Keeps a run's state in the trainer's checkpoints, and goes on from one.

    Args:
        config: `on_resume_mismatch`.
        ranks: the run's processes.
        state, schedule, clock: what is kept.
        drawing: kept too, where rows are drawn.
        fingerprint: makes what must be the same for a checkpoint to be the run's own; called at most once.
    """

    def __init__(
        self,
        config: ICAConfig,
        ranks: Ranks,
        state: RowState,
        schedule: Schedule,
        clock: Clock,
        drawing: Drawing | None,
        fingerprint: Callable[[], dict[str, Any]],
    ):
        self._config, self._ranks = config, ranks
        self._state, self._schedule, self._clock, self._drawing = state, schedule, clock, drawing
        self._make_fingerprint = fingerprint
        self._pending: Checkpoint | None = None

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return self._make_fingerprint()

    def save(self, folder: str, step: int) -> None:
        """Write what a resumed run needs into a checkpoint's folder; the plugin draws no random numbers of its own."""
        record = {
            "step": step,
            "scoring_seconds": self._clock.scoring_seconds,
            "training_seconds": self._clock.training_seconds,
            "fingerprint": self._fingerprint,
            **self._state.record(),
            **self._schedule.record(),
        }
        tensors = self._state.tensors()
        if self._drawing is not None:
            tensors, record = tensors | self._drawing.tensors(), record | self._drawing.record()
        Checkpoint(tensors, record).save(folder)

    def load(self, folder: str) -> None:
        """Read the state of the checkpoint that the trainer resumes from; collective over all ranks.

        Raises:
            ICAError: the state belongs to another run (with `on_resume_mismatch: error`), or is damaged.
        """
        found = self._ranks.first(lambda: Checkpoint.load(folder))
        if found is None:
            get_logger().warning("%s has no ICA state, so all rows are scored again with the policy as it is there.", folder)
            return
        changed = differences(found.record["fingerprint"], self._fingerprint)
        if changed and self._config.on_resume_mismatch == "error":
            raise ICAError(
                f"{folder} was written by another run; what differs: {', '.join(changed)}. Undo the change, start without "
                "resuming, or set `on_resume_mismatch: rescore` to go on and score all rows again."
            )
        if changed:
            get_logger().warning("%s differs in %s; all rows are scored again.", folder, ", ".join(changed))
            return
        self._pending = found

    def resume(self, mid_epoch: bool) -> bool:
        """Go on from what was loaded, once. Returns whether there was something.

        Args:
            mid_epoch: an epoch goes on, rather than that one begins.
        """
        if self._pending is None:
            return False
        tensors, record = self._pending.tensors, self._pending.record
        self._pending = None
        self._state.restore(tensors, record)
        self._clock.resume(record["training_seconds"], record["scoring_seconds"])
        self._schedule.resume(record, mid_epoch)
        if self._drawing is not None:
            self._drawing.restore(tensors, record)
        get_logger().info("resumed at step %d with the weights of %d refresh(es).", record["step"], self._state.counts.refreshes)
        return True
