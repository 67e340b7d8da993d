"""Which train row is where in a batch: an integer column that goes through the host's collator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import ICAError
from .matching import NO_ROW, ids_of_line, places_of_rows
from .packing import PACKING_COLUMNS, packed_lengths
from .read import refuse_transform
from .store import Rows

ROW_IDS = "ica_rows"


class RowIdCollator:
    """Takes the row ids out of the features, calls the host's collator, and adds them back where its rows came out.

    A feature has one id, or one id per token where the host packed several examples into the row. The batch gets
    int64 [B], one id per row (or per line: see `places_of_rows`), or [B, T], one id per token, where rows are packed or
    concatenated without padding. Which row is where is told by tokens in every batch, never by the features' order.
    Batches without ids (evaluation) pass through untouched. Every other attribute is the host collator's.

    Args:
        collator: the host's.
        rows: the train rows, as the collator returns each alone; an id is an index into them.
    """

    def __init__(self, collator: Any, rows: Rows):
        self.collator = collator
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        if name in ("collator", "_rows"):  # not there yet while being unpickled in a data-loader worker
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> Any:
        bins = features if isinstance(features[0], list) else None
        flat = [row for rows in bins for row in rows] if bins is not None else features
        if not isinstance(flat[0], Mapping) or ROW_IDS not in flat[0]:
            return self.collator(features, *args, **kwargs)
        ids = [row[ROW_IDS] for row in flat]
        flat = [{key: value for key, value in row.items() if key != ROW_IDS} for row in flat]
        sizes = [len(rows) for rows in bins] if bins is not None else None
        batch = self.collator(_regroup(flat, sizes) if sizes else flat, *args, **kwargs)
        batch[ROW_IDS] = torch.from_numpy(self._ids_of(batch, ids, sizes))
        return batch

    def _ids_of(self, batch: Any, ids: list[Any], sizes: list[int] | None) -> np.ndarray:
        """int64 [B], [lines] or [B, T]. `sizes`: rows of each line where the host's sampler packed them."""
        lines = _shape(batch)[0]
        if sizes is None and np.ndim(ids[0]) == 0 and lines in (len(ids), 2 * len(ids)):
            numbers = np.array([int(row) for row in ids])
            return numbers[places_of_rows(batch, list(self._rows[numbers]))]
        if "input_ids" not in batch or self._rows.kind == "pair":
            raise ICAError(
                f"a batch of {len(ids)} rows came out of the collator as {tuple(_shape(batch))}: rows and weights cannot be matched. "
                "Switch padding-free preference batches (`padding_free`) off."
            )
        if sizes is None:
            sizes = [1] * len(ids) if lines == len(ids) else [len(ids)]
        packed = iter([self._packed_row(row) for row in ids])
        by_line = zip(batch["input_ids"].cpu().numpy(), sizes, strict=True)
        lines_found = [ids_of_line(line, [next(packed) for _ in range(size)]) for line, size in by_line]
        found = [each for each in lines_found if each is not None]
        if len(found) < len(lines_found):
            raise ICAError(
                "the packed batch does not hold its rows one after the other, so weights cannot be matched to tokens. "
                "Switch sample packing off."
            )
        return np.stack(found)

    def _packed_row(self, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """(id of each token, padding at the end included, and the tokens without it) of a feature in a packed line."""
        if np.ndim(ids) == 0:
            tokens = self._rows[int(ids)].demonstration.tokens
            return np.full(len(tokens), int(ids)), tokens
        ids = np.asarray(ids)
        examples = self._rows[np.unique(ids[ids != NO_ROW])]  # counted in the order in which they stand
        return ids, np.concatenate([example.demonstration.tokens for example in examples])


def _regroup(flat: list[dict], sizes: list[int]) -> list[list[dict]]:
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in sizes]


def row_ids_of(dataset: Any) -> list[Any]:
    """One id per row of a dataset, counted from 0; where the host packed examples into rows, a list of one id per token
    for each row, so that every example has an id of its own, counted through all rows.

    Args:
        dataset: map-style, with `column_names`.

    Raises:
        ICAError: the dataset has a transform, or a column with the name of the plugin's own.
    """
    refuse_transform(dataset, "the train dataset")
    if ROW_IDS in dataset.column_names:
        raise ICAError(
            f"the train dataset has a column `{ROW_IDS}`, the name under which ica_plugin numbers its rows. Rename or remove it: "
            f'`dataset.remove_columns("{ROW_IDS}")`.'
        )
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


def digest_of_ids(row_ids: Iterable[Any]) -> str:
    """A hash of what `row_ids_of` returns: ranks that train together number their rows alike."""
    whole = hashlib.blake2b(digest_size=16)
    for ids in row_ids:
        whole.update(np.append(np.atleast_1d(ids), -2).astype("<i8").data)  # -2 ends a row; no id is that
    return whole.hexdigest()


def _shape(batch: Any) -> torch.Size:
    for key in ("input_ids", "chosen_input_ids", "completion_input_ids"):
        if key in batch:
            return batch[key].shape
    raise ICAError(f"the trainer's batches have none of the known token columns, only {sorted(batch)}.")
