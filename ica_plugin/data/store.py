"""One train or holdout row: its tokens, and which of them the host's loss supervises."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["sft", "pair", "unpaired"]


@dataclass(frozen=True)
class Sequence:
    """Tokens of one prompt and response.

    Attributes:
        tokens: int64 [T].
        scored: bool [T]; True where the host's loss supervises the token. Position 0 is never scored,
            since nothing predicts it.
    """

    tokens: np.ndarray
    scored: np.ndarray

    @property
    def prompt(self) -> np.ndarray:
        """Tokens before the first scored one; the whole row where that leaves nothing."""
        first = int(np.argmax(self.scored)) if self.scored.any() else 0
        return self.tokens[:first] if first > 1 else self.tokens

    @property
    def digest(self) -> str:
        """A hash of the tokens: equal rows have equal digests."""
        return hashlib.blake2b(np.ascontiguousarray(self.tokens).tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Example:
    """One train or holdout row.

    Attributes:
        sequences: (response,) for SFT and unpaired rows, (chosen, rejected) for pairs.
        kind: the kind of row.
        desirable: unpaired rows: whether the response is a good one.
    """

    sequences: tuple[Sequence, ...]
    kind: Kind
    desirable: bool = True

    @property
    def demonstration(self) -> Sequence:
        """What is shown when this row serves as a demonstration: the whole (chosen) row."""
        return self.sequences[0]

    @property
    def supervised_tokens(self) -> int:
        """Number of scored tokens, over all sequences."""
        return int(sum(sequence.scored.sum() for sequence in self.sequences))

    @property
    def can_be_scored(self) -> bool:
        """Every sequence has a supervised token."""
        return all(sequence.scored.any() for sequence in self.sequences)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence.tokens) for sequence in self.sequences)


def scored_tokens(rows: list[Example]) -> np.ndarray:
    """int64 [rows]: supervised tokens of each row, 0 where it cannot be scored."""
    return np.array([row.supervised_tokens if row.can_be_scored else 0 for row in rows])


def digests(examples: Iterable[Example]) -> set[str]:
    """Digests of every sequence of the examples."""
    return {sequence.digest for example in examples for sequence in example.sequences}
