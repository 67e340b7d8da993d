"""Which train row is where in a batch: an integer column that goes through the host's collator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .errors import ICAError

ROW_IDS = "ica_rows"
NO_ROW = -1


class RowIdCollator:
    """Takes the row ids out of the features, calls the host's collator, and adds them back.

    The batch gets int64 [B], one id per row, or [B, T], one id per token, where the host packs rows or concatenates
    them without padding. Batches without ids (evaluation) pass through untouched. Every other attribute is the host
    collator's.
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
        ids = [int(row[ROW_IDS]) for row in flat]
        flat = [{key: value for key, value in row.items() if key != ROW_IDS} for row in flat]
        lengths = [len(row["input_ids"]) if "input_ids" in row else 0 for row in flat]
        tokens = [np.asarray(row["input_ids"]) for row in flat if "input_ids" in row]
        sizes = [len(rows) for rows in bins] if bins is not None else None
        batch = self.collator(_regroup(flat, sizes) if sizes else flat, *args, **kwargs)
        batch[ROW_IDS] = _ids_of(batch, ids, lengths, tokens, sizes)
        return batch


def _regroup(flat: list[dict], sizes: list[int]) -> list[list[dict]]:
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _ids_of(batch: Any, ids: list[int], lengths: list[int], tokens: list[np.ndarray], sizes: list[int] | None) -> torch.Tensor:
    shape = _shape(batch)
    if sizes is None and shape[0] in (len(ids), 2 * len(ids)):
        return torch.tensor(ids)
    if "input_ids" not in batch or len(tokens) != len(ids):
        raise ICAError(
            f"a batch of {len(ids)} rows came out of the collator as {tuple(shape)}: rows and weights cannot be matched. "
            "Switch padding-free preference batches (`padding_free`) off."
        )
    per_token = torch.full(tuple(shape), NO_ROW)
    row = 0
    for line, size in enumerate(sizes or [len(ids)]):
        start = 0
        for _ in range(size):
            stop = start + lengths[row]
            if stop > shape[1] or not np.array_equal(batch["input_ids"][line, start:stop].numpy(), tokens[row]):
                raise ICAError(
                    "the packed batch does not hold its rows one after the other, so weights cannot be matched to tokens. "
                    "Switch sample packing off."
                )
            per_token[line, start:stop] = ids[row]
            start, row = stop, row + 1
    return per_token


def _shape(batch: Any) -> torch.Size:
    for key in ("input_ids", "chosen_input_ids", "completion_input_ids"):
        if key in batch:
            return batch[key].shape
    raise ICAError(f"the trainer's batches have none of the known token columns, only {sorted(batch)}.")
