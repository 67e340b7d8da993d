"""The rows of a run: each token once in memory, as flat arrays; a row is a light view of them."""

from __future__ import annotations

import collections.abc
import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, overload

import numpy as np

from ..errors import ICAError
from .media import Media

Kind = Literal["sft", "pair", "unpaired"]

# Tokens that are hashed at a time, so that a digest of a large store needs no copy of it.
TOKENS_PER_BLOCK = 1 << 22


@dataclass(frozen=True)
class Sequence:
    """Tokens of one prompt and response.

    Attributes:
        tokens: int64 [T].
        scored: bool [T]; True where the host's loss supervises the token. Position 0 is never scored,
            since nothing predicts it.
        media: what its tokens show, with the token at which the row that shows it begins.
    """

    tokens: np.ndarray
    scored: np.ndarray
    media: tuple[tuple[int, Media], ...] = ()

    @property
    def unscored(self) -> Sequence:
        """The same with nothing scored, so that all of it is prompt."""
        return replace(self, scored=np.zeros(len(self.tokens), bool))

    @property
    def prompt(self) -> np.ndarray:
        """Tokens before the first scored one; the whole row where that leaves nothing."""
        first = int(np.argmax(self.scored)) if self.scored.any() else 0
        return self.tokens[:first] if first > 1 else self.tokens

    @property
    def digest(self) -> str:
        """A hash of the tokens (as int64) and of what they show: equal rows have equal digests, whatever type holds the tokens."""
        shown = b"".join(media.digest for _, media in self.media)
        return hashlib.blake2b(np.ascontiguousarray(self.tokens, np.int64).tobytes() + shown, digest_size=16).hexdigest()


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


class Rows(collections.abc.Sequence[Example]):
    """Rows of one kind: indexed and iterated like a list of `Example`, held as flat arrays.

    A million rows of 300 tokens are 1.2 GB of tokens and 0.3 GB of mask, and no Python object per row. An `Example` is made when a
    row is asked for, with int64 tokens of its own. A slice, or `rows[indices]`, shares the arrays. What is known of every row is a
    vector here, computed once without a Python loop.

    Args:
        tokens: int32 [tokens of all rows], one sequence after the other; may be a memmap.
        scored: bool [tokens of all rows].
        starts: int64 [sequences + 1], where each sequence begins; a pair is two of them, chosen then rejected.
        kind: of every row; "sft" where there are none.
        desirable: bool [rows].
        media: of each sequence, see `Sequence`; None where none shows anything.
        picked: int64 [n], the rows of the arrays that these are; None: all.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        scored: np.ndarray,
        starts: np.ndarray,
        kind: Kind,
        desirable: np.ndarray,
        media: list[tuple[tuple[int, Media], ...]] | None = None,
        picked: np.ndarray | None = None,
    ):
        self._tokens, self._scored, self._starts, self._desirable = tokens, scored, starts, desirable
        self.kind: Kind = kind
        self._media, self._picked = media, picked

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Rows:
        """The rows of any examples; `Rows` themselves are returned as they are.

        Raises:
            ICAError: rows of different kinds.
        """
        if isinstance(examples, cls):
            return examples
        builder = RowsBuilder()
        builder.extend(examples)
        return builder.build()

    def __len__(self) -> int:
        return len(self._desirable if self._picked is None else self._picked)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice | np.ndarray | list[int]) -> Rows: ...

    def __getitem__(self, index):
        if isinstance(index, (slice, list, np.ndarray)):
            if isinstance(index, list):
                index = np.array(index, np.int64)
            at = np.arange(len(self._desirable)) if self._picked is None else self._picked
            return Rows(self._tokens, self._scored, self._starts, self.kind, self._desirable, self._media, at[index])
        row = index.__index__()
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        if self._picked is not None:
            row = int(self._picked[row])
        first = row * self._sides
        return Example(tuple(self._sequence(i) for i in range(first, first + self._sides)), self.kind, bool(self._desirable[row]))

    def __iter__(self) -> Iterator[Example]:
        return (self[row] for row in range(len(self)))

    @property
    def _sides(self) -> int:
        return 2 if self.kind == "pair" else 1

    def _sequence(self, index: int) -> Sequence:
        here = slice(int(self._starts[index]), int(self._starts[index + 1]))
        # int64 is what torch takes as an index, and what `random` hashes.
        media = self._media[index] if self._media else ()
        return Sequence(self._tokens[here].astype(np.int64), np.asarray(self._scored[here]), media)

    @property
    def has_media(self) -> bool:
        """Whether any of the rows shows images or videos."""
        return self._media is not None

    def _of_rows(self, by_sequence: np.ndarray) -> np.ndarray:
        """[n, sides]: a fact of each sequence of the arrays, for these rows."""
        by_row = by_sequence.reshape(-1, self._sides)
        return by_row if self._picked is None else by_row[self._picked]

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """int64 [n, sides]: sums of a value of each token."""
        starts, sums = self._starts, np.zeros(len(self._starts) - 1, np.int64)
        first = 0
        while first < len(sums):
            # As many sequences as make a block, so that the copy in int64 (which `reduceat` makes slowly itself) stays small.
            last = max(int(np.searchsorted(starts, starts[first] + TOKENS_PER_BLOCK, "right")) - 1, first + 1)
            here = starts[first:last]
            block = values[here[0] : starts[last]].astype(np.int64)
            some = starts[first + 1 : last + 1] > here  # an empty part would get the value at its start
            if some.any():
                sums[first:last][some] = np.add.reduceat(block, (here - here[0])[some])
            first = last
        return self._of_rows(sums)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n, sides]: tokens of each sequence."""
        return self._of_rows(np.diff(self._starts))

    @cached_property
    def token_sums(self) -> np.ndarray:
        """int64 [n, sides]: sum of each sequence's tokens; rows that differ here are not equal."""
        return self._sums(self._tokens)

    @cached_property
    def _supervised(self) -> np.ndarray:
        return self._sums(self._scored)

    @property
    def longest(self) -> np.ndarray:
        """int64 [n]: tokens of each row's longest sequence."""
        return self.lengths.max(axis=1)

    @property
    def can_be_scored(self) -> np.ndarray:
        """bool [n]: every sequence of the row has a supervised token."""
        return np.all(self._supervised > 0, axis=1)

    @property
    def supervised(self) -> np.ndarray:
        """int64 [n]: supervised tokens of each row over its sequences, 0 where it cannot be scored."""
        return np.where(self.can_be_scored, self._supervised.sum(axis=1), 0)

    @property
    def desirable(self) -> np.ndarray:
        """bool [n]: unpaired rows: whether the response is a good one; True for the others."""
        return self._desirable if self._picked is None else self._desirable[self._picked]

    @cached_property
    def digest(self) -> str:
        """A hash of all rows in order: tokens, masks, images, what is desirable; equal rows give equal ones, however they are held."""
        tokens, scored = (hashlib.blake2b(digest_size=16) for _ in range(2))
        for flat in self._blocks():
            tokens.update(np.ascontiguousarray(self._tokens[flat], "<i4").data)
            scored.update(np.ascontiguousarray(self._scored[flat], bool).data)
        whole = hashlib.blake2b(digest_size=16)
        for part in (self.kind.encode(), tokens.digest(), scored.digest(), self.lengths.astype("<i8"), self.desirable):
            whole.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
        if self._media:
            whole.update("".join(sequence.digest for row in self for sequence in row.sequences).encode())
        return whole.hexdigest()

    def _blocks(self) -> Iterator[slice]:
        """Parts of the flat arrays that hold these rows, in order."""
        if self._picked is None:
            spans: Iterable[tuple[int, int]] = [(int(self._starts[0]), int(self._starts[-1]))] if len(self) else []
        else:
            firsts = self._picked * self._sides
            spans = zip(self._starts[firsts].tolist(), self._starts[firsts + self._sides].tolist(), strict=True)
        for begin, end in spans:
            for start in range(begin, end, TOKENS_PER_BLOCK):
                yield slice(start, min(start + TOKENS_PER_BLOCK, end))


class RowsBuilder:
    """Takes examples one by one and keeps their tokens alone."""

    def __init__(self):
        self._tokens, self._scored, self._starts = array("i"), bytearray(), array("q", [0])
        self._desirable = bytearray()
        self._media: list[tuple[tuple[int, Media], ...]] = []
        self._kind: Kind | None = None

    def extend(self, examples: Iterable[Example]) -> None:
        """Add examples.

        Raises:
            ICAError: another kind of row than those before.
        """
        for example in examples:
            if self._kind not in (None, example.kind):
                raise ICAError(f"{self._kind} rows and {example.kind} rows in one set; a run trains on one kind.")
            self._kind = example.kind
            for sequence in example.sequences:
                self._tokens.frombytes(np.ascontiguousarray(sequence.tokens, np.int32).tobytes())
                self._scored += np.ascontiguousarray(sequence.scored, bool).tobytes()
                self._starts.append(len(self._tokens))
                self._media.append(sequence.media)
            self._desirable.append(example.desirable)

    def build(self) -> Rows:
        """The rows so far."""
        return Rows(
            np.frombuffer(self._tokens, np.int32),
            np.frombuffer(self._scored, bool),
            np.frombuffer(self._starts, np.int64),
            self._kind or "sft",
            np.frombuffer(self._desirable, bool),
            self._media if any(self._media) else None,
        )


def digests(examples: Iterable[Example]) -> set[str]:
    """Digests of every sequence of the examples."""
    return {sequence.digest for example in examples for sequence in example.sequences}
