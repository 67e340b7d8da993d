"""The holdout: checked against the context and the train rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..errors import ICAError
from ..log import get_logger
from .store import Example, digests


@dataclass(frozen=True)
class Holdout:
    """The good examples that serve as demonstrations.

    Attributes:
        examples: all holdout rows, in the order of the file.
        shown: indices of the rows that may be demonstrations: with a supervised token, and desirable.
        hidden_from: per train row, the holdout indices that are that very row and so are never shown to it.
        sets: the part of `shown` in each named set; "" where there is one holdout without a name.
    """

    examples: list[Example]
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


def check_holdout(source: str, examples: list[Example], train: list[Example], context: int | None) -> Holdout:
    """Check tokenised holdout rows and find those that are train rows too (by token hash).

    Args:
        source: the holdout as the user named it, for messages.
        examples: holdout rows.
        train: train rows.
        context: the model's context in tokens, None if unlimited.

    Raises:
        ICAError: empty, another kind of rows than the run trains on, no supervised token, or a row over the context.
    """
    usable = usable_holdout_rows(source, examples, context)
    if train and examples[0].kind != train[0].kind:
        raise ICAError(f"ica.holdout: {source}: its rows are {examples[0].kind} rows but the run trains on {train[0].kind} rows.")
    by_digest: dict[str, list[int]] = {}
    for index in usable:
        by_digest.setdefault(examples[index].demonstration.digest, []).append(index)
    hidden = [frozenset(index for digest in digests([row]) for index in by_digest.get(digest, ())) for row in train]
    holdout = Holdout(examples, usable, hidden, {"": usable})
    if holdout.rows_in_train:
        get_logger().warning(
            "%d of %d train rows are also in the holdout (%s). They are never shown to themselves, but a holdout that is "
            "trained on measures memory too; use rows of their own if you can.",
            holdout.rows_in_train,
            len(train),
            source,
        )
    return holdout


def joined(sets: dict[str, Holdout]) -> Holdout:
    """Named holdouts as one, whose examples stand one after the other and whose `sets` tell them apart."""
    if len(sets) == 1:
        name, alone = next(iter(sets.items()))
        return replace(alone, sets={name: alone.shown})
    examples, by_name = [], {}
    hidden = [frozenset()] * len(next(iter(sets.values())).hidden_from)
    for name, part in sets.items():
        start = len(examples)
        examples += part.examples
        by_name[name] = [start + index for index in part.shown]
        hidden = [before | {start + index for index in more} for before, more in zip(hidden, part.hidden_from, strict=True)]
    return Holdout(examples, [index for shown in by_name.values() for index in shown], hidden, by_name)


def usable_holdout_rows(source: str, examples: list[Example], context: int | None) -> list[int]:
    """Indices of the holdout rows that may be shown as demonstrations.

    Raises:
        ICAError: empty, no supervised token, no desirable row, or a row over the context.
    """
    if not examples:
        raise ICAError(f"ica.holdout: {source} has no rows. Give at least one good example; 50 to 500 serve well.")
    too_long = [i for i, row in enumerate(examples) if context is not None and row.longest > context]
    if too_long:
        raise ICAError(
            f"ica.holdout: {source}: {len(too_long)} row(s) are longer than the model's context of {context} tokens, "
            f"first row {too_long[0]} with {examples[too_long[0]].longest}. Shorten or remove them."
        )
    usable = [i for i, row in enumerate(examples) if row.can_be_scored]
    if not usable:
        raise ICAError(
            f"ica.holdout: {source}: none of its {len(examples)} rows has a supervised token under the run's prompt "
            "format. Check that the holdout has the same fields as the training data."
        )
    if examples[0].kind == "unpaired":
        usable = [i for i in usable if examples[i].desirable]
        if not usable:
            raise ICAError(
                f"ica.holdout: {source}: no row is labelled desirable, and demonstrations are the desirable rows. "
                "Give rows with a true label."
            )
    if len(usable) < len(examples):
        get_logger().info("holdout: %d of %d rows can be shown as demonstrations.", len(usable), len(examples))
    return usable
