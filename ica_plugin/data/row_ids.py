"""Which train row is where in a batch: an integer column that goes through the host's collator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import ICAError
from .packing import PACKING_COLUMNS, packed_lengths

ROW_IDS = "ica_rows"


NO_ROW = -1


class RowIdCollator:
    """Takes the row ids out of the features, calls the host's collator, and adds them back.

    A feature has one id, or one id per token where the host packed several examples into the row. The batch gets
    int64 [B], one id per row, or [B, T], one id per token, where rows are packed or concatenated without padding.
    Batches without ids (evaluation) pass through untouched. Every other attribute is the host collator's.
    """

    def __init__(self, collator: Any):
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # not there yet while being unpickled in a data-loader worker
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> Any:
        bins = features if isinstance(features[0], list) else None
        flat = [row for rows in bins for row in rows] if bins is not None else features
        if not isinstance(flat[0], Mapping) or ROW_IDS not in flat[0]:
            return self.collator(features, *args, **kwargs)
        ids = [row[ROW_IDS] for row in flat]
        flat = [{key: value for key, value in row.items() if key != ROW_IDS} for row in flat]
        tokens = [np.asarray(row["input_ids"]) for row in flat if "input_ids" in row]
        sizes = [len(rows) for rows in bins] if bins is not None else None
        batch = self.collator(_regroup(flat, sizes) if sizes else flat, *args, **kwargs)
        batch[ROW_IDS] = _ids_of(batch, ids, tokens, sizes)
        return batch


def _regroup(flat: list[dict], sizes: list[int]) -> list[list[dict]]:
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _ids_of(batch: Any, ids: list[Any], tokens: list[np.ndarray], sizes: list[int] | None) -> torch.Tensor:
    shape = _shape(batch)
    if sizes is None and np.ndim(ids[0]) == 0 and shape[0] in (len(ids), 2 * len(ids)):
        return torch.tensor([int(row) for row in ids])
    if "input_ids" not in batch or len(tokens) != len(ids):
        raise ICAError(
            f"a batch of {len(ids)} rows came out of the collator as {tuple(shape)}: rows and weights cannot be matched. "
            "Switch padding-free preference batches (`padding_free`) off."
        )
    if sizes is None:
        sizes = [1] * len(ids) if shape[0] == len(ids) else [len(ids)]
    lines = []
    for line, size in zip(batch["input_ids"], sizes, strict=True):
        rows, ids = list(zip(ids[:size], tokens[:size], strict=True)), ids[size:]
        tokens = tokens[size:]
        left_padding = shape[1] - sum(len(row) for _, row in rows)
        found = (_ids_of_line(line.numpy(), rows, start) for start in (0, left_padding) if start >= 0)
        lines.append(next((each for each in found if each is not None), None))
    if any(each is None for each in lines):
        raise ICAError(
            "the packed batch does not hold its rows one after the other, so weights cannot be matched to tokens. "
            "Switch sample packing off."
        )
    return torch.from_numpy(np.stack(lines))


def _ids_of_line(line: np.ndarray, rows: list[tuple[Any, np.ndarray]], start: int) -> np.ndarray | None:
    """int64 [T]: the id of each token of a packed line, if its rows stand one after the other from `start` on."""
    found = np.full(len(line), NO_ROW)
    for ids, tokens in rows:
        here = np.broadcast_to(ids, tokens.shape)
        real = int((here != NO_ROW).sum())  # a packed row may end with padding, which some collators cut off
        stop = start + real
        if stop > len(line) or not np.array_equal(line[start:stop], tokens[:real]):
            return None
        found[start:stop] = here[:real]
        start += len(tokens)
    return found


def row_ids_of(dataset: Any) -> list[Any]:
    """One id per row of a dataset, counted from 0; where the host packed examples into rows, a list of one id per token
    for each row, so that every example has an id of its own, counted through all rows.

    Args:
        dataset: map-style, with `column_names`.
    """
    columns = [name for name in ("input_ids", *PACKING_COLUMNS) if name in dataset.column_names]
    if columns[1:] in ([], ["attention_mask"]):
        return list(range(len(dataset)))
    rows = dataset.select_columns(columns)
    lengths = [packed_lengths(row) for row in rows]
    if not any(lengths):
        return list(range(len(dataset)))
    result, first = [], 0
    for row, parts in zip(rows, lengths, strict=True):
        parts = [len(row["input_ids"])] if parts is None else parts
        ids = np.full(len(row["input_ids"]), NO_ROW)
        ids[: sum(parts)] = np.repeat(np.arange(first, first + len(parts)), parts)
        result.append(ids.tolist())
        first += len(parts)
    return result


def _shape(batch: Any) -> torch.Size:
    for key in ("input_ids", "chosen_input_ids", "completion_input_ids"):
        if key in batch:
            return batch[key].shape
    raise ICAError(f"the trainer's batches have none of the known token columns, only {sorted(batch)}.")
