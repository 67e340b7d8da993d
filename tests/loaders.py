"""`Places` under accelerate's prepared loaders, every rank of them in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.state import GradientState
from torch.utils.data import DataLoader

from ica_plugin.training.places import Places
from ica_plugin.training.windows import Windows


class Rank:
    """One rank's loader: epochs of row ids, by the steps that the trainer and the callback take.

    Args:
        make: a loader of `range(n)`, not prepared, whose batches are lists of rows.
        weights: float [n]; None for the host's own loader.
        more: `prepare_data_loader`'s process_index, num_processes, split_batches, even_batches.
    """

    def __init__(self, make: Callable[[], DataLoader], weights: np.ndarray | None, places: dict | None = None, **more: Any):
        torch.manual_seed(0)
        self.loader = prepare_data_loader(make(), use_seedable_sampler=True, data_seed=3, **more)
        self.reported: list[Counter] = []
        self.places = None
        if weights is not None:
            settings = dict(places or {})
            self.asked = settings.pop("candidates", 2)
            self.places = Places.under(self.loader, **settings)
            self.weights = np.array(weights, float)

    def epoch(
        self, epoch: int, window: int | None = None, rest: bool = False, last: int = 10**9, each: Any = None
    ) -> list[list[Any]]:
        """Micro-batches of an epoch; with `window`, drawn by that many at a time, and `each` called after each."""
        if self.places is not None:
            self.places.begin(
                lambda: self.weights, lambda rows: self.reported.append(Counter(rows.tolist())), by_window=bool(window)
            )
            if window:
                self.windows = Windows(self.places, self.asked)
                self.windows.begin_epoch(epoch, done=0, last=last)
            else:
                self.places.begin_epoch(epoch, last=last)
        self.loader.set_epoch(epoch)
        if not window:
            return list(self.loader)
        return self._by_window(iter(self.loader), window, rest, each)

    def _by_window(self, batches: Any, window: int, rest: bool, each: Any) -> list[list[Any]]:
        found, windows, self.candidates = [], self.windows, []
        windows.follow(batches)
        while not windows.at_end:
            if windows.needs_one or rest and len(found) % window == 0:
                self.candidates.append(windows.candidates(window, windows.position, rest=rest))
                windows.draw()
            found.append(next(windows.hand_on(torch.device("cpu"), GradientState())))
            if each:
                each()
        return found

    def state(self) -> tuple:
        """What a checkpoint keeps: tensors, epoch, and of windows where the running one stands."""
        windows = getattr(self, "windows", None)
        return self.places.state(), self.places.epoch, None if windows is None else (windows.position, windows.until)

    def resumed(self, epoch: int, state: tuple, done: int, window: int | None = None) -> list[list[Any]]:
        """Micro-batches of an epoch after the first `done`, from `state()` as it was then."""
        tensors, of_epoch, at = state
        self.places.begin(lambda: self.weights, lambda rows: None, by_window=bool(window))
        self.places.resume(tensors, of_epoch)
        if window:
            self.windows = Windows(self.places, self.asked)
            self.windows.position, self.windows.until = at
            self.windows.begin_epoch(epoch, done=done, last=10**9)
        else:
            self.places.begin_epoch(epoch, last=10**9)
        rest = skip_first_batches(self.loader, done)
        rest.set_epoch(epoch)
        if not window:
            return list(rest)
        return self._by_window(iter(rest), window, False, None)


def rows_of(batches: list) -> list[int]:
    flat = batches
    while flat and isinstance(flat[0], (list, tuple)):
        flat = [item for batch in flat for item in batch]
    return flat
