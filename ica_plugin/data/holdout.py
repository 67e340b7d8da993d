"""The holdout: checked against the context and the train rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from ..errors import ICAError
from ..log import get_logger
from .store import Example, Rows


@dataclass(frozen=True)
class Holdout:
    """The good examples that serve as demonstrations.

    Attributes:
        examples: all holdout rows, in the order of the file.
        shown: indices of the rows that may be demonstrations: with a supervised token, and desirable.
        hidden_from: per train row, the holdout indices that are that very row and so are never shown to it.
        sets: the part of `shown` in each named set; "" where there is one holdout without a name.
    """

    examples: Sequence[Example]
    shown: list[int]
    hidden_from: list[frozenset[int]]
    sets: dict[str, list[int]] = field(default_factory=dict)

    def only(self, name: str) -> Holdout:
        """The holdout with no other rows shown than those of one set."""
        return replace(self, shown=self.sets[name], sets={name: self.sets[name]})

    def part(self, shown: list[int]) -> Holdout:
        """The holdout with only these rows shown, in the same sets."""
        wanted = set(shown)
        sets = {name: [index for index in of_set if index in wanted] for name, of_set in self.sets.items()}
        return replace(self, shown=shown, sets=sets)

    @property
    def rows_in_train(self) -> int:
        """Number of train rows that are also in the holdout."""
        return sum(bool(hidden) for hidden in self.hidden_from)

    @property
    def digest(self) -> str:
        """A hash of the rows, of which may be shown, and of the sets: what every rank must hold alike."""
        parts = (Rows.of(self.examples).digest, json.dumps([self.shown, list(self.sets.items())]))
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def check_holdout(source: str, examples: Iterable[Example], train: Iterable[Example], context: int | None) -> Holdout:
    """Check tokenised holdout rows and find those that are train rows too (by their tokens).

    Args:
        source: the holdout as the user named it, for messages.
        examples: holdout rows.
        train: train rows.
        context: the model's context in tokens, None if unlimited.

    Raises:
        ICAError: empty, another kind of rows than the run trains on, no supervised token, or a row over the context.
    """
    examples, train = Rows.of(examples), Rows.of(train)
    usable = usable_holdout_rows(source, examples, context)
    if len(train) and examples.kind != train.kind:
        raise ICAError(f"ica.holdout: {source}: its rows are {examples.kind} rows but the run trains on {train.kind} rows.")
    holdout = Holdout(examples, usable, _hidden_from(train, examples, usable), {"": usable})
    if holdout.rows_in_train:
        get_logger().warning(
            "%d of %d train rows are also in the holdout (%s). They are never shown to themselves, but a holdout that is "
            "trained on measures memory too; use rows of their own if you can.",
            holdout.rows_in_train,
            len(train),
            source,
        )
    return holdout


def _hidden_from(train: Rows, examples: Rows, usable: list[int]) -> list[frozenset[int]]:
    """For each train row the holdout rows whose demonstration is one of its sequences."""
    hidden: list[frozenset[int]] = [frozenset()] * len(train)
    by_digest: dict[str, list[int]] = {}
    for index in usable:
        by_digest.setdefault(examples[index].demonstration.digest, []).append(index)
    # Only what agrees in length and sum of tokens can be equal; it alone is hashed, not every train row.
    held = np.stack([examples.lengths[usable, 0], examples.token_sums[usable, 0]], axis=1)
    pairs = np.stack([train.lengths.ravel(), train.token_sums.ravel()], axis=1)
    alike = np.isin(pairs.view("i8,i8").ravel(), np.ascontiguousarray(held).view("i8,i8").ravel())
    for row in np.flatnonzero(alike.reshape(train.lengths.shape).any(axis=1)).tolist():
        found = (by_digest.get(sequence.digest, ()) for sequence in train[row].sequences)
        hidden[row] = frozenset(chain.from_iterable(found))
    return hidden


def joined(sets: dict[str, Holdout]) -> Holdout:
    """Named holdouts as one, whose examples stand one after the other and whose `sets` tell them apart."""
    if len(sets) == 1:
        name, alone = next(iter(sets.items()))
        return replace(alone, sets={name: alone.shown})
    by_name: dict[str, list[int]] = {}
    hidden: list[frozenset[int]] = [frozenset()] * len(next(iter(sets.values())).hidden_from)
    start = 0
    for name, part in sets.items():
        by_name[name] = [start + index for index in part.shown]
        for row, more in enumerate(part.hidden_from):
            if more:
                hidden[row] = hidden[row] | {start + index for index in more}
        start += len(part.examples)
    examples = Rows.of(chain.from_iterable(part.examples for part in sets.values()))
    return Holdout(examples, [index for shown in by_name.values() for index in shown], hidden, by_name)


def usable_holdout_rows(source: str, examples: Rows, context: int | None) -> list[int]:
    """Indices of the holdout rows that may be shown as demonstrations.

    Raises:
        ICAError: empty, no supervised token, no desirable row, or a row over the context.
    """
    if not len(examples):
        raise ICAError(f"ica.holdout: {source} has no rows. Give at least one good example; 50 to 500 serve well.")
    if context is not None and (examples.longest > context).any():
        too_long = np.flatnonzero(examples.longest > context)
        raise ICAError(
            f"ica.holdout: {source}: {len(too_long)} row(s) are longer than the model's context of {context} tokens, "
            f"first row {too_long[0]} with {examples.longest[too_long[0]]}. Shorten or remove them."
        )
    usable = np.flatnonzero(examples.can_be_scored)
    if not len(usable):
        raise ICAError(
            f"ica.holdout: {source}: none of its {len(examples)} rows has a supervised token under the run's prompt "
            "format. Check that the holdout has the same fields as the training data."
        )
    if examples.kind == "unpaired":
        usable = np.flatnonzero(examples.can_be_scored & examples.desirable)
        if not len(usable):
            raise ICAError(
                f"ica.holdout: {source}: no row is labelled desirable, and demonstrations are the desirable rows. "
                "Give rows with a true label."
            )
    if len(usable) < len(examples):
        get_logger().info("holdout: %d of %d rows can be shown as demonstrations.", len(usable), len(examples))
    return usable.tolist()
