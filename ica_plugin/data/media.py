"""Images and videos of rows: made anew by the host's collator whenever a row is scored, never kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from ..errors import ICAError

Tensors = dict[str, torch.Tensor]

# What a model takes for all images of a batch one after the other, on the first dimension.
CONCATENATED = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "image_position_ids",
    "pixel_attention_mask",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)

# What it takes for every token: [lines, T].
BY_TOKEN = ("token_type_ids", "mm_token_type_ids")

# Of these a batch has one only where it has images, videos or sounds.
MEDIA_KEYS = (*CONCATENATED, "images", "image_bound", "input_features", "feature_attention_mask", "cross_attention_mask")

# LLaMA-Factory's columns of what a row shows; its collator adds an image to text rows, whose tokens are masked.
MEDIA_COLUMNS = ("images", "videos", "audios")

# What a batch says of its tokens. Positions are the model's own: those of a row alone do not hold after its demonstrations.
TEXT_KEYS = (
    "input_ids",
    "labels",
    "attention_mask",
    "completion_mask",
    "position_ids",
    "rope_deltas",
    "label",
    "kto_tags",
    "kl_token_type_ids",
)

# Before them, where a batch has its sides apart.
PARTS = ("chosen", "rejected", "prompt", "completion", "kl")

# Rows whose tensors are held at a time: demonstrations come again.
ROWS_KEPT = 16


@dataclass(frozen=True, slots=True)
class Media:
    """What one sequence shows beside its tokens.

    Attributes:
        load: makes the tensors of the row's sequences, one mapping each.
        side: which of the row's sequences it is.
        digest: of the tensors; equal images have equal digests.
    """

    load: Callable[[], list[Tensors]] = field(compare=False, repr=False)
    side: int
    digest: bytes

    def tensors(self) -> Tensors:
        """The tensors by the model's own names: concatenated ones as they are, those by token without padding as [T].

        Raises:
            ICAError: the collator makes other ones than when the row was read.
        """
        found = self.load()[self.side]
        if _digest(found) != self.digest:
            raise ICAError(
                "the images of a row are others than when it was read: the collator changes them at random, or their files changed. "
                "Its scores would not be those of what is trained. Switch the augmentation off."
            )
        return found


@dataclass(frozen=True, slots=True)
class _Row:
    source: MediaSource
    row: int

    def __call__(self) -> list[Tensors]:
        return self.source.tensors(self.row)


class MediaSource:
    """The tensors of a dataset's rows, through the host's collator.

    Args:
        dataset: map-style.
        collator: the trainer's own.
    """

    def __init__(self, dataset: Any, collator: Callable[[list[dict]], Mapping[str, Any]]):
        self._dataset, self._collator = dataset, collator
        self._kept: OrderedDict[int, list[Tensors]] = OrderedDict()

    def media(self, row: int, features: Mapping[str, Any], batch: Mapping[str, Any]) -> list[Media]:
        """What the sequences of a collated row show; empty where they are text.

        Args:
            row: its place in the dataset.
            features: the row.
            batch: the row, collated.

        Raises:
            ICAError: of a kind that cannot be put behind demonstrations.
        """
        if not has_media(features, batch):
            return []
        sides = _sides(batch)
        return [Media(_Row(self, row), side, _digest(tensors)) for side, tensors in enumerate(sides)]

    def tensors(self, row: int) -> list[Tensors]:
        """The tensors of each sequence of a row."""
        if row not in self._kept:
            self._kept[row] = _sides(self._collator([dict(self._dataset[row])]))
            if len(self._kept) > ROWS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(row)
        return self._kept[row]


def has_media(features: Mapping[str, Any], batch: Mapping[str, Any]) -> bool:
    """Whether a row shows anything; what the collator adds to a row whose own columns of media are empty counts for nothing."""
    columns = [features[name] for name in MEDIA_COLUMNS if name in features]
    tokenised = any(name.endswith("input_ids") for name in features)  # else images may stand in messages too
    if tokenised and columns and not any(columns):
        return False
    return any(batch.get(key) is not None for key in MEDIA_KEYS)


def _sides(batch: Mapping[str, Any]) -> list[Tensors]:
    """The tensors of each line of a collated row; of a pair the first half are the chosen's."""
    present = {key for key, value in batch.items() if value is not None and not _is_text(key)}
    if unknown := sorted(present - {*CONCATENATED, *BY_TOKEN}):
        raise ICAError(
            f"its batch has `{unknown[0]}`, which ica_plugin cannot put behind demonstrations. Give `ica.weights`, or remove the "
            "`ica:` block."
        )
    if "input_ids" not in batch:
        raise ICAError(
            "its prompt and its answers come in tensors of their own beside its images, as TRL before 1.0 has them for preference "
            "trainers, which keep the first image of a row alone. Use TRL 1 or later."
        )
    lines = batch["input_ids"].shape[0]
    whole = {key: torch.as_tensor(batch[key]).cpu() for key in CONCATENATED if key in present}
    if any(len(value) % lines for value in whole.values()):
        raise ICAError(
            f"it has {lines} lines, and { ({key: tuple(value.shape) for key, value in whole.items()}) } to share among them."
        )
    sides = [{key: value.chunk(lines)[side] for key, value in whole.items()} for side in range(lines)]
    for key in present.intersection(BY_TOKEN):
        for side, tensors in enumerate(sides):
            tensors[key] = batch[key][side].cpu()[batch["attention_mask"][side].cpu() != 0]
    return sides


def _is_text(key: str) -> bool:
    return any(key in (name, *(f"{part}_{name}" for part in PARTS)) for name in TEXT_KEYS)


def _digest(tensors: Tensors) -> bytes:
    whole = hashlib.blake2b(digest_size=16)
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        whole.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        whole.update(value.view(torch.uint8).numpy().data if value.numel() else b"")
    return whole.digest()


def joined_tensors(lines: Sequence[Sequence[tuple[int, Media]]], longest: int) -> Tensors:
    """What a forward over right-padded lines takes beside their tokens.

    Images follow each other line by line, in a line as they stand in it; where their shapes differ they are padded with zeros at
    the end, as processors pad them. What is by token is 0 where a line says nothing.

    Args:
        lines: of each line, where in it each of its media begins.
        longest: T, tokens of a padded line.

    Returns:
        tensors on the CPU by the model's names; empty for text.
    """
    concatenated: dict[str, list[torch.Tensor]] = {}
    by_token: Tensors = {}
    for line, media in enumerate(lines):
        for start, each in media:
            tensors = each.tensors()
            # Idefics and its like pad the images of a line: [lines, images, …]. All on one line is the same to the model.
            images = 1 if "pixel_attention_mask" in tensors else 0
            for key, value in tensors.items():
                if key in BY_TOKEN:
                    of_lines = by_token.setdefault(key, torch.zeros(len(lines), longest, dtype=value.dtype))
                    of_lines[line, start : start + len(value)] = value
                else:
                    concatenated.setdefault(key, []).append(value.flatten(0, images) if images else value)
    found = {key: _concatenated(values) for key, values in concatenated.items()}
    if "pixel_attention_mask" in found:
        found = {key: value[None] for key, value in found.items()}
    return {**found, **by_token}


def _concatenated(values: list[torch.Tensor]) -> torch.Tensor:
    shape = np.max([value.shape[1:] for value in values], axis=0)
    padded = [
        pad(value, [side for size, own in zip(shape[::-1], value.shape[:0:-1], strict=True) for side in (0, int(size - own))])
        for value in values
    ]
    return torch.cat(padded)
