"""Corrupted copies of rows, on their tokens, so that every host's rows can be corrupted alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..data.store import Example, Sequence


def corrupted(rows: list[Example], tokenizer: Any, rng: np.random.Generator) -> dict[str, list[Example | None]]:
    """Copies of rows by kind of corruption; None where a row has nothing to corrupt in that way.

    Pairs: `flipped`, chosen and rejected exchanged. Other rows, with the prompt left as it is: `another row's answer`,
    `words shuffled` (the answer's tokens in another order), `steps dropped` (the first three quarters of the answer taken
    out) and `altered numbers` (each token of digits replaced by another of as many digits). The last token of an answer,
    which ends the turn, stays where it is.

    Args:
        rows: clean rows with supervised tokens. Rows of several turns are corrupted in their last.
        tokenizer: the run's.
        rng: draws.
    """
    if rows[0].kind == "pair":
        return {"flipped": [dataclasses.replace(row, sequences=row.sequences[::-1]) for row in rows]}
    digits = _digit_tokens(tokenizer)
    found: dict[str, list[Example | None]] = {}
    answers = [_last_answer(row.sequences[0]) for row in rows]
    for kind in ("another row's answer", "words shuffled", "steps dropped", "altered numbers"):
        copies: list[Example | None] = []
        for i, row in enumerate(rows):
            sequence, (start, stop) = row.sequences[0], answers[i]
            answer = sequence.tokens[start : stop - 1]
            other = int(rng.integers(len(rows) - 1)) if len(rows) > 1 else 0
            other += other >= i
            new = {
                "another row's answer": lambda: (
                    rows[other].sequences[0].tokens[answers[other][0] : answers[other][1] - 1] if len(rows) > 1 else answer
                ),
                "words shuffled": lambda: rng.permutation(answer),
                "steps dropped": lambda: answer[3 * len(answer) // 4 :],
                "altered numbers": lambda: np.array([_other_number(token, digits, rng) for token in answer.tolist()], np.int64),
            }[kind]()
            copies.append(
                None
                if np.array_equal(new, answer)
                else Example((_with_answer(sequence, start, stop, new),), row.kind, row.desirable)
            )
        found[kind] = copies
    return found


def _last_answer(sequence: Sequence) -> tuple[int, int]:
    """Start and stop of the last run of supervised tokens."""
    stop = int(np.flatnonzero(sequence.scored)[-1]) + 1
    before = np.flatnonzero(~sequence.scored[:stop])
    return (int(before[-1]) + 1 if len(before) else 0), stop


def _with_answer(sequence: Sequence, start: int, stop: int, answer: np.ndarray) -> Sequence:
    tokens = np.concatenate([sequence.tokens[:start], answer, sequence.tokens[stop - 1 :]])
    scored = np.concatenate([sequence.scored[:start], np.ones(len(answer), bool), sequence.scored[stop - 1 :]])
    scored[0] = False
    return Sequence(tokens, scored, sequence.media)


def _digit_tokens(tokenizer: Any) -> dict[int, list[int]]:
    """Token → the other tokens that are as many digits."""
    size: dict[int, list[int]] = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if text.isascii() and text.isdigit():
            size.setdefault(len(text), []).append(token)
    return {token: [other for other in group if other != token] for group in size.values() for token in group}


def _other_number(token: int, digits: dict[int, list[int]], rng: np.random.Generator) -> int:
    others = digits.get(token)
    return int(rng.choice(others)) if others else token
