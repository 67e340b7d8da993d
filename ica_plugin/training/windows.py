"""`apply: sample` with a refresh in steps: rows are drawn window by window.

The loader asks for batches ahead of their training, one by itself and more for its workers, and Axolotl packs an epoch at once. So
the host's iterator is started once an epoch, for its order and its random numbers, and the batches of each window are fetched by a
loader of the window's own: the host's data set and collator, no worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from .batch_lists import Batch, copies, rows_of
from .places import Places


class Windows:
    """The windows of an epoch, one after the other.

    Args:
        places: under the run's loader, begun with `by_window`.
        candidates: rows considered per place of a window (`candidates`).

    Attributes:
        position: micro-batches of the epoch that are trained.
        until: the micro-batch of the epoch that ends the running window.
    """

    def __init__(self, places: Places, candidates: int = 2):
        self.places, self._candidates = places, candidates
        self.position = self.until = 0
        self._window: Iterator[Any] = iter(())
        self._followed = False
        self._next: tuple[Any, ...] = ()

    def begin_epoch(self, epoch: int, *, done: int, last: int) -> None:
        """See `Places.begin_epoch`; `done`: micro-batches of the epoch that were trained already, on each rank."""
        resumed = self.places.begin_epoch(epoch, last=last)
        if resumed:
            # The host's count is too high after an epoch that was shorter than it had counted (packed rows).
            self.places.limit = last - done + self.position
            self._open(self.places.of_this_rank()[self.position : self.until])
        else:
            self.position, self.until = done, 0
            self._window = iter(())
        self._followed = False

    def follow(self, batches: Iterator[dict]) -> None:
        """Start the host's epoch iterator, once an epoch: from then on its order is known, and its random numbers are drawn."""
        if not self._followed:
            self._followed = True
            next(batches, None)

    def candidates(self, micro_batches: int, step: int, *, rest: bool = False) -> list[int]:
        """The rows to score for a window that begins with the next micro-batch.

        Args:
            micro_batches: of the window, on each rank; it ends with the epoch at the latest.
            step: optimizer steps so far.
            rest: every row whose place in the host's order is still to come (`refresh_scope: all`), instead of `candidates` times
                as many as the window has places. Then the rest of the epoch is drawn.
        """
        places = self.places
        sizes, among = places.whole()
        first, until = self.position, min(self.position + micro_batches, places.micro_batches)
        begin = first * places.together
        end = len(sizes) if rest else min(until * places.together, len(sizes))
        # A unit is a row, or a batch where the host packs.
        before, wanted = (begin, end - begin) if places.packs else (sum(sizes[:begin]), sum(sizes[begin:end]))
        if rest:
            chosen = among[round(before * len(among) / (len(sizes) if places.packs else sum(sizes))) :]
        else:
            # Windows share the host's order out among themselves, so no row is a candidate again before all were.
            start = self._candidates * before % len(among)
            chosen = (among + among)[start : start + min(self._candidates * wanted, len(among))]
        self._next = (first, until, begin, sizes[begin:end], chosen, step)
        return sorted(set(rows_of(chosen)))

    def draw(self) -> None:
        """Fill the window's places from its candidates, by the newest weights."""
        places = self.places
        first, until, begin, sizes, among, step = self._next
        # Resumed without its state, the epoch's places so far are not known, and not needed.
        places.plan = (places.plan or copies(places.host_batches or []))[:begin]
        places.plan += places.drawn(among, sizes, step)
        places.planned = True
        self.until = places.micro_batches if begin + len(sizes) == len(places.whole()[0]) else until
        mine = places.of_this_rank()[first : self.until]
        places.allow(mine)  # with what accelerate repeats of the epoch's beginning, so that every rank has as many batches
        self._open(mine)
        places.report_trained(first, min(until, places.limit))

    @property
    def needs_one(self) -> bool:
        """Nothing is drawn for the next micro-batch yet."""
        return not self.places.planned or self.position >= self.until

    @property
    def at_end(self) -> bool:
        """The epoch has no further micro-batch, though by the host's count it may."""
        places = self.places
        return self.position >= places.micro_batches or self.position * places.together >= len(places.whole()[0])

    def _open(self, batches: list[Batch]) -> None:
        loader = self.places.loader
        self._window = iter(
            DataLoader(
                loader.dataset,
                batch_sampler=batches,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                generator=torch.Generator(),  # it draws a seed for workers, which must not come out of the run's
            )
        )

    def hand_on(self, device: torch.device, gradient_state: Any) -> Iterator[dict]:
        """The window's batches that are still to come.

        Args:
            device: the trainer's.
            gradient_state: accelerate's, in which the epoch's last batch is marked.
        """
        for batch in self._window:
            self.position += 1
            if gradient_state.active_dataloader is not None:
                gradient_state.active_dataloader.end_of_dataloader = self.at_end
            yield send_to_device(batch, device)
