"""Rows into which the host packed several examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .store import Example, Sequence

# Columns that tell the examples of a packed row apart; see `packed_lengths`.
PACKING_COLUMNS = ("seq_lengths", "position_ids", "attention_mask")


def packed_lengths(row: Mapping[str, Any]) -> list[int] | None:
    """Lengths of the examples that the host packed into one row, in order; None for a row that is one example.

    Known layouts: `seq_lengths` (TRL's `bfd` and `bfd_split`); an `attention_mask` that numbers the examples from 1
    (LLaMA-Factory's `neat_packing`); `position_ids` that start again at 0 with each example, and stay 0 over the padding
    (LLaMA-Factory's `packing`).
    """
    if row.get("seq_lengths") is not None:
        return [int(length) for length in row["seq_lengths"]]
    if row.get("position_ids") is None:
        return None
    position = np.asarray(row["position_ids"])
    if position.ndim != 1:
        return None
    numbers = np.asarray(row.get("attention_mask", np.ones_like(position)))
    if numbers.max(initial=0) > 1:
        return np.bincount(numbers[numbers > 0])[1:].tolist()
    starts = np.flatnonzero(position == 0)
    if len(starts) < 2:
        return None
    end = int(np.flatnonzero(position)[-1]) + 1 if position.any() else 0
    return np.diff(np.append(starts[starts < end], end)).tolist()


def unpacked(batch: Mapping[str, Any], lengths: list[int]) -> list[Example]:
    """The examples of one collated packed row. They stand one after the other from its first token on."""
    tokens = batch["input_ids"][0].cpu().numpy().astype(np.int64)
    scored = (batch["labels"][0] != -100).cpu().numpy()
    examples, start = [], 0
    for length in lengths:
        mask = scored[start : start + length].copy()
        mask[:1] = False
        examples.append(Example((Sequence(tokens[start : start + length], mask),), "sft"))
        start += length
    return examples
