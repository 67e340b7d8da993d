"""Drawn rows packed into bins by the host's own packing (Axolotl's `MultipackBatchSampler`)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from .batch_lists import Batch, copies, rows_of

# How often a window or epoch is packed at most until it has as many batches as the host's.
ATTEMPTS = 20


def is_packing(host: Any) -> bool:
    """Whether a batch sampler packs rows by their lengths."""
    return hasattr(host, "generate_batches") and hasattr(host, "lengths")


def drawn_and_packed(host: Any, among: list[Batch], count: int, draw: Callable[[np.ndarray, int], np.ndarray]) -> list[Batch]:
    """`count` batches packed of rows drawn from the batches `among`.

    An epoch of packed rows is as long as its bins, so the number of rows follows their lengths: as many are drawn as fill
    the batches. First-fit in the host's order of bins packs the host's own bins again, so rows that are drawn once each stay
    where they are.

    Args:
        host: the packing batch sampler.
        among: its batches.
        count: number of batches.
        draw: order, places → the rows drawn, see `weighting.draws.drawn`.
    """
    order = np.array(rows_of(among))
    places = max(round(len(order) * count / len(among)), 1)
    rows = draw(order, places)
    if count == len(among) and np.array_equal(rows, order):
        return copies(among)
    few, enough, batches = 0, None, []
    for _ in range(ATTEMPTS):
        packed = _pack(host, rows)
        if len(packed) >= count:
            enough, batches = places, packed
        else:
            few = places
        if len(packed) == count or (enough is not None and enough - few <= 1):
            break
        if enough is not None and few:
            places = (few + enough) // 2
        elif enough is not None:
            places = max(min(places * count // len(packed), places - 1), 1)
        else:
            places = max(places * count // max(len(packed), 1), places + 1)
        rows = draw(order, places)
    return copies(batches[:count])


def _pack(host: Any, rows: np.ndarray) -> list[Batch]:
    """Batches of bins of these rows in this order."""
    own = {name: getattr(host, name) for name in ("sampler", "_batches", "num_processes") if hasattr(host, name)}
    host.sampler, host._batches = rows.tolist(), None
    if len(rows) <= host.group_size:
        host.num_processes = 1  # a pool of processes takes longer to start than one group to pack
    gc.freeze()  # it collects garbage each time, which takes a second where much is loaded; what is frozen is passed over
    try:
        return host.generate_batches(set_stats=False)
    finally:
        gc.unfreeze()
        for name, value in own.items():
            setattr(host, name, value)
