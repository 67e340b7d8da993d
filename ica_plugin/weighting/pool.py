"""Which scored rows speak for the others: never more than so many, however long the run."""

from __future__ import annotations

from collections import deque

import numpy as np

# What the policy says of a row grows old, so half are the newest; the others keep what was scored long ago from being forgotten.
NEWEST = 2048
SAMPLED = 2048


class Pool:
    """The newest rows added, and an even sample of those that came before them (reservoir sampling, Vitter 1985).

    Args:
        seed: of the sample; ranks that add the same rows hold the same.
    """

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        self._newest: deque[int] = deque()
        self._sample: list[int] = []
        self._members: set[int] = set()
        self._passed = 0

    @property
    def rows(self) -> np.ndarray:
        """int64, sorted."""
        return np.array(sorted(self._members), dtype=np.int64)

    def add(self, rows: np.ndarray) -> None:
        """Add rows of the same age; one that is in already stays where it is."""
        for row in self._rng.permutation(rows).tolist():
            if row not in self._members:
                self._members.add(row)
                self._newest.append(row)
                if len(self._newest) > NEWEST:
                    self._retire(self._newest.popleft())

    def _retire(self, row: int) -> None:
        """Into the sample with the chance that makes it one of all that were ever retired; or out."""
        self._passed += 1
        if len(self._sample) < SAMPLED:
            self._sample.append(row)
            return
        place = int(self._rng.integers(self._passed))
        if place < SAMPLED:
            row, self._sample[place] = self._sample[place], row
        self._members.remove(row)
