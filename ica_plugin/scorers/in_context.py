"""Log-probs of rows with and without their demonstrations in front: what `ica` is, and other scorers share."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from ..data.store import Example, Sequence
from ..policy.engine import Engine, Progress

# Bounds the memory of the sequences with their demonstrations.
ROWS_PER_BLOCK = 4096


@dataclass(frozen=True)
class Scores:
    """Scores of n rows, with what they were made from.

    Attributes:
        base: float64 [n]; log-prob of the response (pairs: chosen minus rejected) without demonstrations, nats
            (per token with `length_normalize`).
        context: the same after the demonstrations.
        score: context − base, with the sign turned for undesirable unpaired rows; NaN where a row has no
            supervised token or no demonstration.
        sums: float64 [n, sequences]; summed log-prob of each sequence without demonstrations, NaN where not scored.
        tokens: of each row float32 [scored tokens], the log-prob of each after the demonstrations; none where it has no
            demonstration, or where tokens were not asked for.
    """

    base: np.ndarray
    context: np.ndarray
    score: np.ndarray
    sums: np.ndarray
    tokens: list[np.ndarray]


def ica_scores(
    engine: Engine,
    examples: list[Example],
    demonstrations: list[list[int]],
    holdout: SequenceOf[Example],
    *,
    length_normalize: bool,
    progress: Progress = lambda done: None,
    keep_tokens: bool = False,
) -> Scores:
    """ICA scores (arXiv 2510.14459, eq. 7, for pairs with the difference of chosen and rejected).

    `score = log π(y | C, x) − log π(y | x)`, where C is the tokens of the row's demonstrations, whole rows one
    after the other, in front of the tokens of the row.

    Args:
        engine: the policy's log-probs.
        examples: n rows.
        demonstrations: per row, indices into `holdout`, in the order in which they are shown.
        holdout: holdout rows.
        length_normalize: mean log-prob per token instead of the sum.
        progress: called with the number of tokens done.
        keep_tokens: keep the log-probs of single tokens too; of pairs there are none.
    """
    tokens = [np.zeros(0, np.float32)] * len(examples)
    scored = [i for i, row in enumerate(examples) if row.can_be_scored]
    # Rows with the same first demonstrations next to each other: they share that part of the forward.
    scored.sort(key=lambda i: demonstrations[i])
    base, context = np.full(len(examples), np.nan), np.full(len(examples), np.nan)
    alone = np.full((len(examples), max((len(row.sequences) for row in examples), default=1)), np.nan)
    for start in range(0, len(scored), ROWS_PER_BLOCK):
        block = scored[start : start + ROWS_PER_BLOCK]
        flat: list[Sequence] = []
        for i in block:
            shown = [holdout[d].demonstration for d in demonstrations[i]]
            for sequence in examples[i].sequences:
                flat += [sequence, in_context(sequence, shown)]
        of_tokens: list[np.ndarray] | None = [] if keep_tokens else None
        values = iter(engine.logprobs(flat, progress, of_tokens))
        for place, i in enumerate(block):
            if of_tokens is not None and demonstrations[i] and len(examples[i].sequences) == 1:
                tokens[i] = of_tokens[2 * place + 1]
            sums = []
            for side, sequence in enumerate(examples[i].sequences):
                counted = int(sequence.scored.sum()) if length_normalize else 1
                alone[i, side] = next(values)
                sums.append((alone[i, side] / counted, next(values) / counted))
            base[i], context[i] = sums[0] if len(sums) == 1 else np.subtract(sums[0], sums[1])
    score = context - base
    for i, row in enumerate(examples):
        if not demonstrations[i]:
            score[i] = np.nan
        elif not row.desirable:
            score[i] = -score[i]
    return Scores(base, context, score, alone, tokens)


def beginning(example: Example, tokens: int | None) -> Example:
    """The row up to the last of its first so many supervised tokens (`score_tokens`), each of its sequences by itself.

    What stands after them is cut off, so that no forward computes it; a row that shows images keeps it, unscored, since its pixel
    tensors go with the tokens of the whole.

    Args:
        example: any row.
        tokens: how many; None for all.
    """
    return example if tokens is None else replace(example, sequences=tuple(_beginning(s, tokens) for s in example.sequences))


def _beginning(sequence: Sequence, tokens: int) -> Sequence:
    supervised = np.flatnonzero(sequence.scored)
    if len(supervised) <= tokens:
        return sequence
    end = int(supervised[tokens - 1]) + 1
    if sequence.media:
        return replace(sequence, scored=sequence.scored & (np.arange(len(sequence.scored)) < end))
    return replace(sequence, tokens=sequence.tokens[:end], scored=sequence.scored[:end])


def in_context(sequence: Sequence, demonstrations: list[Sequence]) -> Sequence:
    """The sequence after its demonstrations; only its own tokens are scored."""
    parts = [*(demonstration.unscored for demonstration in demonstrations), sequence]
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)]).tolist()
    return Sequence(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.scored for part in parts]),
        tuple((start + at, media) for start, part in zip(starts, parts, strict=False) for at, media in part.media),
    )
