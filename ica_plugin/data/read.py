"""A host's rows, as its collator hands them to the model → `Rows`.

Reading rows through the trainer's own collator means that what is scored is what is trained: the same
truncation, the same label mask, the same column names, whatever the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import ICAError
from .batches import examples_from_batch
from .media import MEDIA_COLUMNS, Media, MediaSource
from .packing import packed_lengths, unpacked
from .store import Example, Rows, RowsBuilder

# TRL's preference trainers name theirs so; all others end in `input_ids`.
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")

Collator = Callable[[list[dict]], Mapping[str, Any]]


def read_examples(dataset: Any, collator: Collator) -> Rows:
    """Read every row of a map-style dataset through the trainer's collator, one row at a time.

    A row into which the host packed several examples gives one `Example` for each, in order.

    Args:
        dataset: rows in the columns that the trainer holds; see `without_text_columns`.
        collator: the trainer's own.

    Raises:
        ICAError: a transform on the dataset; and see `examples_from_batch`, the message names the row.
    """
    refuse_transform(dataset, "the dataset")
    dataset = without_text_columns(dataset)
    rows, source = RowsBuilder(), MediaSource(dataset, collator)
    for index, row in enumerate(dataset):
        try:
            batch = collator([dict(row)])
            lengths = packed_lengths(row)
            examples = examples_from_batch(_with_mask(batch, row), rows=1) if lengths is None else unpacked(batch, lengths)
            if media := source.media(index, row, batch):
                examples = [_showing(examples, media)]
            rows.extend(examples)
        except ICAError as error:
            raise ICAError(f"row {index}: {error}") from None
    return rows.build()


def _showing(examples: list[Example], media: list[Media]) -> Example:
    """The example of a row with what it shows."""
    if len(examples) > 1:
        raise ICAError("the host packed rows with images into one, which ica_plugin cannot take apart. Switch packing off.")
    sequences = [replace(sequence, media=((0, each),)) for sequence, each in zip(examples[0].sequences, media, strict=True)]
    return replace(examples[0], sequences=tuple(sequences))


def _with_mask(batch: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch of one row with a 2-D attention mask, where the collator made none (padding-free) or a 4-D one."""
    mask = batch.get("attention_mask")
    if "input_ids" not in batch or "input_ids" not in row or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return batch
    return {**batch, "attention_mask": torch.arange(batch["input_ids"].shape[1])[None] < len(row["input_ids"])}


def one_row(features: list[dict]) -> dict[str, torch.Tensor]:
    """A collator of one tokenised row, where there is no trainer to ask for its own; images are left out."""
    return {key: torch.tensor([value]) for key, value in features[0].items() if value is not None and key not in MEDIA_COLUMNS}


# TRL 0.24 sets one of its own on every SFT dataset, which leaves out keys without a value and changes nothing else.
HARMLESS_TRANSFORMS = {"remove_none_values"}


def refuse_transform(dataset: Any, what: str) -> None:
    """Raise ICAError for a dataset whose rows a function makes anew whenever they are read (`with_transform`, `set_transform`).

    Args:
        dataset: `datasets.Dataset`.
        what: the dataset, for the message.
    """
    layout = getattr(dataset, "format", None) or {}
    transform = (layout.get("format_kwargs") or {}).get("transform")
    if layout.get("type") == "custom" and getattr(transform, "__name__", "") not in HARMLESS_TRANSFORMS:
        raise ICAError(
            f"{what} makes its rows anew whenever they are read (`with_transform` or `set_transform`), so that a row that was scored "
            "need not be the row that is trained, and a row number added to it may be dropped. Apply the function once instead: "
            "`dataset.with_format(None).map(...)`."
        )


def token_columns(columns: Iterable[str]) -> list[str]:
    """The columns that hold tokens, by their names; none where the collator makes them of text."""
    return [name for name in columns if name.endswith("input_ids") or name in TOKEN_COLUMNS]


def without_text_columns(dataset: Any) -> Any:
    """The dataset in the columns that its collator takes.

    Of tokenised rows these are the numeric ones (numbers and lists of numbers) and those of media; rows without tokens, which the
    collator makes of text and images, keep all.
    """
    features = getattr(dataset, "features", None)
    if not features or not token_columns(features):
        return dataset

    def numeric(feature: Any) -> bool:
        while hasattr(feature, "feature"):
            feature = feature.feature
        dtype = getattr(feature, "dtype", None)
        # A column of nothing but nulls (LLaMA-Factory's `images` of text rows) is one that the collator may ask for.
        return isinstance(dtype, str) and dtype.startswith(("int", "uint", "float", "bool", "null"))

    return dataset.select_columns([name for name, feature in features.items() if name in MEDIA_COLUMNS or numeric(feature)])
