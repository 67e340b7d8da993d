"""Rows that say nearly the same: cosine of their counts of letter sequences."""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np
from scipy import sparse

from ..errors import ICAError

LETTERS = 5  # in a sequence: words without spaces (Chinese, Japanese) are compared as others are
BUCKETS = 2**20


class NearCopies:
    """Texts taken so far, and whether a further one is nearly a copy of one of them.

    The cosine is that of the counts of all sequences of 5 letters, blanks and case set aside: 1 for the same text, about 0.93 where one
    word in twenty differs, 0.8 where one in ten does, and under 0.45 for any two of 100 rows of GSM8K.

    Args:
        most: cosine above which a text is a near copy.

    Raises:
        ICAError: a cosine that is not above 0 and below 1.
    """

    def __init__(self, most: float):
        if not 0 < most < 1:
            raise ICAError(f"--max-cosine {most}: give a number above 0 and below 1, such as 0.9.")
        self.most = most
        self._blocks: list[sparse.csr_matrix] = []  # of texts taken, the older the larger: few products however many texts

    def add(self, text: str) -> bool:
        """Take a text, unless it is a near copy of one taken before; whether it was taken."""
        line = _counts(text)
        if any((block @ line.T).max() > self.most for block in self._blocks):
            return False
        self._blocks.append(line)
        while len(self._blocks) > 1 and self._blocks[-1].shape == self._blocks[-2].shape:
            self._blocks[-2:] = [sparse.vstack(self._blocks[-2:], format="csr")]
        return True


def _counts(text: str) -> sparse.csr_matrix:
    """float [1, BUCKETS], of length 1."""
    text = " ".join(text.lower().split())
    counts = Counter(zlib.crc32(text[i : i + LETTERS].encode()) % BUCKETS for i in range(max(1, len(text) - LETTERS + 1)))
    values = np.array(list(counts.values()), np.float64)
    where = (np.zeros(len(counts), int), np.array(list(counts)))
    return sparse.csr_matrix((values / np.linalg.norm(values), where), shape=(1, BUCKETS))
