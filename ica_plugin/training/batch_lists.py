"""Batches before they are fetched: lists of rows, or, where the host packs, lists of bins, which are lists of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

Batch = list[Any]


class Fixed:
    """A batch sampler of batches that are there.

    Args:
        batches: what it yields.
        batch_size: as of the batch sampler that it stands for.
    """

    def __init__(self, batches: list[Batch], batch_size: int | None):
        self.batches, self.batch_size = batches, batch_size

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def copies(batches: Iterable[Batch]) -> list[Batch]:
    """Batches that may be changed in place, as accelerate's shards do."""
    return [list(batch) for batch in batches]


def rows_of(batches: list[Any]) -> list[int]:
    """Row numbers in order, of batches of rows or of bins, or of rows."""
    flat = batches
    while flat and isinstance(flat[0], (list, tuple)):
        flat = [item for batch in flat for item in batch]
    return flat


def flat(name: str, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Batches as int32 tensors: all rows, and how many each bin (or batch) holds; for bins, how many each batch holds."""
    bins = bool(batches) and isinstance(batches[0][0], (list, tuple))
    parts = [part for batch in batches for part in batch] if bins else batches
    tensors = {"rows": rows_of(batches), "parts": [len(part) for part in parts]}
    if bins:
        tensors["batches"] = [len(batch) for batch in batches]
    return {f"{name}.{key}": torch.tensor(value, dtype=torch.int32) for key, value in tensors.items()}


def nested(name: str, tensors: dict[str, torch.Tensor]) -> list[Batch]:
    """What `flat` was made of."""
    found = tensors[f"{name}.rows"].tolist()
    for key in ("parts", "batches"):
        if f"{name}.{key}" in tensors:
            rest = iter(found)
            found = [[next(rest) for _ in range(size)] for size in tensors[f"{name}.{key}"].tolist()]
    return found
