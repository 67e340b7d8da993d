"""Micro-batches of a coming interval, drawn before they are trained, so that exactly their rows can be scored."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from accelerate.state import GradientState
from accelerate.utils import send_to_device

from ..data.row_ids import ROW_IDS


class LookAhead:
    """Draws micro-batches from the trainer's epoch iterator and hands them on unchanged and in order.

    Args:
        gradient_state: accelerate's. Drawing ahead makes it believe that the epoch's last batch is being trained, so each
            batch is handed on with the mark that it had when it was drawn.
        device: where the trainer has its batches; those that wait do so in the CPU's memory.
    """

    def __init__(self, gradient_state: GradientState, device: torch.device):
        self._gradient_state = gradient_state
        self._device = device
        self._drawn: deque[tuple[dict, bool]] = deque()

    def __bool__(self) -> bool:
        return bool(self._drawn)

    @property
    def rows(self) -> list[int]:
        """Row ids of the batches drawn and not yet handed on, sorted, each once."""
        return sorted({row for batch, _ in self._drawn for row in batch[ROW_IDS].unique().tolist() if row >= 0})

    def clear(self) -> None:
        """Forget what was drawn, as at the start of an epoch."""
        self._drawn.clear()

    def draw(self, batches: Iterator[dict], count: int) -> None:
        """Draw until `count` batches are there, or the epoch ends."""
        while len(self._drawn) < count:
            try:
                batch = next(batches)
            except StopIteration:
                break
            last = self._gradient_state.end_of_dataloader
            self._drawn.append((send_to_device(batch, "cpu") if self._device.type != "cpu" else batch, last))
            if last:
                break
        self._mark_end(bool(self._drawn) and self._drawn[0][1])

    def hand_on(self, batches: Iterator[dict]) -> Iterator[dict]:
        """The batches drawn, then those still in `batches`."""
        while self._drawn:
            batch, last = self._drawn.popleft()
            self._mark_end(last)
            yield send_to_device(batch, self._device) if self._device.type != "cpu" else batch
        for batch in batches:  # not `yield from`, which would close the trainer's iterator with this one
            yield batch

    def _mark_end(self, last: bool) -> None:
        loader = self._gradient_state.active_dataloader
        if loader is not None:
            loader.end_of_dataloader = last
