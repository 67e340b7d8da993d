"""Which row stands where in a collated batch, told by tokens: a collator may sort, interleave, cut or pack its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import ICAError
from .batches import examples_from_batch
from .store import Example, Sequence

NO_ROW = -1

Part = Callable[[Sequence, Sequence], bool]


def places_of_rows(batch: Mapping[str, Any], expected: list[Example]) -> np.ndarray:
    """For each row of a padded batch, which of the rows that went in it is.

    The first of these that holds for the whole batch: the rows in their order; in another one; pairs line by line in any order
    (interleaved); and the first two again for rows that the collator cut at one end or labelled otherwise than alone.
    Rows of equal content may stand for each other, since then so may their weights.

    Args:
        batch: what the collator returned.
        expected: the rows that went in, as the collator returns each alone.

    Returns:
        int64 [rows], indices into `expected`; [2 * rows], one for each line, where pairs are not chosen then rejected.

    Raises:
        ICAError: no order of the rows explains the batch, or more than one does.
    """
    in_order = np.arange(len(expected))
    if len(expected) == 1:  # nothing to mix up, whatever the collator did to it
        return in_order
    found = examples_from_batch(batch, len(expected))
    contents = [_content(*row.sequences, desirable=row.desirable) for row in expected]
    found_contents = [_content(*row.sequences, desirable=row.desirable) for row in found]
    if found_contents == contents:
        return in_order
    part = _part_of(batch)
    order = _by_content(found_contents, contents)
    if order is None:
        order = _line_by_line(batch, found, expected, lambda a, b: _content(a) == _content(b))
    if order is None and all(_parts(row, own, part) for row, own in zip(found, expected, strict=True)):
        order = in_order
    if order is None:
        order = _unambiguous([[_parts(row, other, part) for other in expected] for row in found])
    if order is None:
        order = _line_by_line(batch, found, expected, part)
    if order is not None and order is not in_order and len(set(contents)) < len({_shown(row) for row in expected}):
        raise ICAError(
            f"a batch of {len(expected)} rows came out of the collator in another order, and some of them differ in their images alone, "
            "which a batch does not tell apart. Use a collator that keeps the order."
        )
    if order is None:
        raise ICAError(
            f"a batch of {len(expected)} rows came out of the collator with other tokens than the rows have one by one, so weights "
            "cannot be matched to rows. The collator may put rows in another order or cut them at one end; it must not mix, repeat or "
            "change them."
        )
    return order


def _content(*sequences: Sequence, desirable: bool = True) -> tuple:
    return (desirable, *((s.tokens.astype(np.int64).tobytes(), s.scored.tobytes()) for s in sequences))


def _shown(row: Example) -> tuple:
    return (*_content(*row.sequences, desirable=row.desirable), *(sequence.digest for sequence in row.sequences))


def _by_content(found: list[tuple], expected: list[tuple]) -> np.ndarray | None:
    places: dict[tuple, list[int]] = {}
    for place in reversed(range(len(expected))):
        places.setdefault(expected[place], []).append(place)
    order = [places[content].pop() if places.get(content) else NO_ROW for content in found]
    return None if NO_ROW in order else np.array(order)


def _line_by_line(batch: Mapping[str, Any], found: list[Example], expected: list[Example], part: Part) -> np.ndarray | None:
    """int64 [2 * rows]: the row of each line, where both lines of every row are there, on whichever line."""
    if expected[0].kind != "pair" or "input_ids" not in batch:  # chosen and rejected in tensors of their own are paired by place
        return None
    lines = [row.sequences[side] for side in (0, 1) for row in found]
    wanted = [(place, row.sequences[side]) for place, row in enumerate(expected) for side in (0, 1)]
    possible = [{place for place, sequence in wanted if part(line, sequence)} for line in lines]
    if any(len(places) != 1 for places in possible):
        return None
    order = np.array([places.pop() for places in possible])
    return order if (np.bincount(order, minlength=len(expected)) == 2).all() else None


def _parts(row: Example, whole: Example, part: Part) -> bool:
    return row.desirable == whole.desirable and all(map(part, row.sequences, whole.sequences))


def _part_of(batch: Mapping[str, Any]) -> Part:
    """Whether the tokens of a line are a row's, or its beginning or end."""
    # Without a mask, the padding of a line without supervised tokens is not told from them: then the row may be the line's part.
    masked = any("attention_mask" in key and getattr(value, "ndim", 0) == 2 for key, value in batch.items())

    def part(line: Sequence, row: Sequence) -> bool:
        short, long = line.tokens, row.tokens
        if len(short) > len(long) and not masked and not line.scored[len(long) :].any():
            short, long = long, short
        size = len(short)
        return 0 < size <= len(long) and (np.array_equal(short, long[:size]) or np.array_equal(short, long[-size:]))

    return part


def _unambiguous(matches: list[list[bool]]) -> np.ndarray | None:
    """The one column of each line, where each line has one and no two the same."""
    table = np.array(matches)
    one_each = (table.sum(axis=0) == 1).all() and (table.sum(axis=1) == 1).all()
    return table.argmax(axis=1) if one_each else None


def ids_of_line(line: np.ndarray, rows: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray | None:
    """int64 [T]: the id of each token of a packed line, whose rows stand one after the other from its first token on, or, padded on
    the left, up to its last; `NO_ROW` for padding. None where they do not.

    Args:
        line: int [T], the tokens.
        rows: of each row the ids [t] of its tokens, `NO_ROW` for padding at its end, and its tokens without that padding.
    """
    left_padding = len(line) - sum(len(ids) for ids, _ in rows)
    for start in (0, left_padding):
        if start >= 0 and (found := _ids_from(line, rows, start)) is not None:
            return found
    return None


def _ids_from(line: np.ndarray, rows: list[tuple[np.ndarray, np.ndarray]], start: int) -> np.ndarray | None:
    found = np.full(len(line), NO_ROW)
    for ids, tokens in rows:
        stop = start + len(tokens)  # a packed row may end with padding, which some collators cut off
        if stop > len(line) or not np.array_equal(line[start:stop], tokens):
            return None
        found[start:stop] = ids[: len(tokens)]
        start += len(ids)
    return found


def places_of_tokens(line: np.ndarray, tokens: np.ndarray, real: np.ndarray | None) -> np.ndarray | None:
    """Where each token of a padded line stands in its row.

    Args:
        line: int [T].
        tokens: int [n], of the row.
        real: bool [T], what of the line is no padding; None where the batch does not say.

    Returns:
        int64 [T], places in `tokens`; `NO_ROW` for padding. None where the line holds neither the row nor its beginning or end, or may
        be either.
    """
    found = np.full(len(line), NO_ROW)
    spans = [np.flatnonzero(real)] if real is not None else _spans(len(line), len(tokens))
    for at in spans:
        held = line[at]
        both = {0, max(len(tokens) - len(held), 0)}
        firsts = {first for first in both if np.array_equal(held, tokens[first : first + len(held)])}
        if len(firsts) == 1:
            found[at] = np.arange(len(held)) + firsts.pop()
            return found
    return None


def _spans(width: int, size: int) -> list[np.ndarray]:
    """Where a row may stand in a line without a mask: padded on the right, on the left, or cut."""
    if size >= width:
        return [np.arange(width)]
    return [np.arange(size), np.arange(width - size, width)]
