"""A host's row, as its collator hands it to the model → `Example`.

Reading rows through the trainer's own collator means that what is scored is what is trained: the same
truncation, the same label mask, the same column names, whatever the host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from .errors import ICAError

Kind = Literal["sft", "pair", "unpaired"]

# Columns that tell the examples of a packed row apart; see `packed_lengths`.
PACKING_COLUMNS = ("seq_lengths", "position_ids", "attention_mask")
MULTIMODAL_KEYS = ("pixel_values", "pixel_values_videos", "input_features", "image_grid_thw", "images")


@dataclass(frozen=True)
class Sequence:
    """Tokens of one prompt and response.

    Attributes:
        tokens: int64 [T].
        scored: bool [T]; True where the host's loss supervises the token. Position 0 is never scored,
            since nothing predicts it.
    """

    tokens: np.ndarray
    scored: np.ndarray

    @property
    def prompt(self) -> np.ndarray:
        """Tokens before the first scored one; the whole row where that leaves nothing."""
        first = int(np.argmax(self.scored)) if self.scored.any() else 0
        return self.tokens[:first] if first > 1 else self.tokens

    @property
    def digest(self) -> str:
        """A hash of the tokens: equal rows have equal digests."""
        return hashlib.blake2b(np.ascontiguousarray(self.tokens).tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Example:
    """One train or holdout row.

    Attributes:
        sequences: (response,) for SFT and unpaired rows, (chosen, rejected) for pairs.
        kind: the kind of row.
        desirable: unpaired rows: whether the response is a good one.
    """

    sequences: tuple[Sequence, ...]
    kind: Kind
    desirable: bool = True

    @property
    def demonstration(self) -> Sequence:
        """What is shown when this row serves as a demonstration: the whole (chosen) row."""
        return self.sequences[0]

    @property
    def supervised_tokens(self) -> int:
        """Number of scored tokens, over all sequences."""
        return int(sum(sequence.scored.sum() for sequence in self.sequences))

    @property
    def can_be_scored(self) -> bool:
        """Every sequence has a supervised token."""
        return all(sequence.scored.any() for sequence in self.sequences)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence.tokens) for sequence in self.sequences)


def examples_from_batch(batch: Mapping[str, Any], rows: int) -> list[Example]:
    """Take a collated batch apart.

    Known layouts, by their keys: `input_ids` + `labels` (transformers, Axolotl, TRL SFT; 2 × rows of them are
    LLaMA-Factory's chosen-then-rejected), `input_ids` + `completion_mask` (TRL ≥ 1 DPO, with 2 × rows; KTO, with
    `label`), `chosen_input_ids` + `chosen_labels` (TRL CPO and ORPO), `prompt_input_ids` + `chosen_input_ids`
    (TRL 0.x DPO), `completion_input_ids` + `completion_labels` (TRL 0.x KTO), `kto_tags` (LLaMA-Factory KTO).

    Args:
        batch: what the host's collator returns for `rows` rows.
        rows: number of rows that went in.

    Raises:
        ICAError: unknown layout, or multimodal rows.
    """
    present = [key for key in MULTIMODAL_KEYS if batch.get(key) is not None]
    if present:
        raise ICAError(
            f"the training rows are multimodal (`{present[0]}`), which ica_plugin cannot score yet. Remove the `ica:` block."
        )
    if "chosen_labels" in batch:
        chosen = _masked(batch["chosen_input_ids"], batch["chosen_labels"] != -100, batch.get("chosen_attention_mask"))
        rejected = _masked(batch["rejected_input_ids"], batch["rejected_labels"] != -100, batch.get("rejected_attention_mask"))
        return [Example(pair, "pair") for pair in zip(chosen, rejected, strict=True)]
    if "chosen_input_ids" in batch and "prompt_input_ids" in batch:
        chosen, rejected = (_joined(batch, "prompt", side) for side in ("chosen", "rejected"))
        return [Example(pair, "pair") for pair in zip(chosen, rejected, strict=True)]
    if "completion_labels" in batch and "completion_input_ids" in batch:
        responses = _masked(
            batch["completion_input_ids"], batch["completion_labels"] != -100, batch.get("completion_attention_mask")
        )
        return [Example((one,), "unpaired", bool(good)) for one, good in zip(responses, batch["label"], strict=True)]
    if "input_ids" in batch and ("completion_mask" in batch or "labels" in batch):
        mask = batch["completion_mask"] != 0 if "completion_mask" in batch else batch["labels"] != -100
        sequences = _masked(batch["input_ids"], mask, batch.get("attention_mask"))
        tags = batch.get("kto_tags", batch.get("label") if "completion_mask" in batch else None)
        if tags is not None:
            return [Example((one,), "unpaired", bool(good)) for one, good in zip(sequences, tags, strict=True)]
        if len(sequences) == 2 * rows:
            return [Example(pair, "pair") for pair in zip(sequences[:rows], sequences[rows:], strict=True)]
        if len(sequences) == rows:
            return [Example((one,), "sft") for one in sequences]
    shapes = {key: tuple(value.shape) for key, value in batch.items() if hasattr(value, "shape")}
    raise ICAError(
        f"the trainer's batches have a layout ica_plugin does not know (for {rows} row(s): {shapes}). "
        "Supported: SFT, DPO, IPO, SimPO, CPO, ORPO and KTO rows, without padding-free preference batches."
    )


def scored_tokens(rows: list[Example]) -> np.ndarray:
    """int64 [rows]: supervised tokens of each row, 0 where it cannot be scored."""
    return np.array([row.supervised_tokens if row.can_be_scored else 0 for row in rows])


def read_examples(dataset: Any, collator: Callable[[list[dict]], Mapping[str, Any]]) -> list[Example]:
    """Read every row of a map-style dataset through the trainer's collator, one row at a time.

    A row into which the host packed several examples gives one `Example` for each, in order.

    Args:
        dataset: rows in the columns that the trainer holds; text columns are dropped, since collators do not
            take them.
        collator: the trainer's own.

    Raises:
        ICAError: see `examples_from_batch`; the message names the row.
    """
    dataset = without_text_columns(dataset)
    examples = []
    for index, row in enumerate(dataset):
        try:
            batch = collator([dict(row)])
            lengths = packed_lengths(row)
            examples += examples_from_batch(_with_mask(batch, row), rows=1) if lengths is None else _unpacked(batch, lengths)
        except ICAError as error:
            raise ICAError(f"row {index}: {error}") from None
    return examples


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


def _unpacked(batch: Mapping[str, Any], lengths: list[int]) -> list[Example]:
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


def _with_mask(batch: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch of one row with a 2-D attention mask, where the collator made none (padding-free) or a 4-D one."""
    mask = batch.get("attention_mask")
    if "input_ids" not in batch or "input_ids" not in row or (torch.is_tensor(mask) and mask.dim() == 2):
        return batch
    return {**batch, "attention_mask": torch.arange(batch["input_ids"].shape[1])[None] < len(row["input_ids"])}


def digests(examples: Iterable[Example]) -> set[str]:
    """Digests of every sequence of the examples."""
    return {sequence.digest for example in examples for sequence in example.sequences}


def _masked(tokens: torch.Tensor, scored: torch.Tensor, attention: torch.Tensor | None) -> list[Sequence]:
    """Rows of a padded batch as sequences without their padding. All inputs [B, T]."""
    sequences = []
    for i in range(tokens.shape[0]):
        if attention is not None and attention.dim() == 2:
            real = attention[i] != 0
        else:
            # No mask to tell padding by: what follows the last supervised token is never scored.
            positions = torch.nonzero(scored[i])
            end = int(positions[-1]) + 1 if len(positions) else tokens.shape[1]
            real = torch.arange(tokens.shape[1]) < end
        real = real.cpu().numpy()
        mask = scored[i].cpu().numpy()[real].astype(bool)
        mask[:1] = False
        sequences.append(Sequence(tokens[i].cpu().numpy()[real].astype(np.int64), mask))
    return sequences


def _joined(batch: Mapping[str, Any], prompt: str, response: str) -> list[Sequence]:
    """Prompt and response in separate padded tensors (TRL 0.x DPO) as whole sequences."""
    sequences = []
    for i in range(batch[f"{prompt}_input_ids"].shape[0]):
        parts = []
        for side in (prompt, response):
            real = batch[f"{side}_attention_mask"][i].cpu().numpy().astype(bool)
            parts.append(batch[f"{side}_input_ids"][i].cpu().numpy()[real].astype(np.int64))
        scored = np.arange(len(parts[0]) + len(parts[1])) >= max(len(parts[0]), 1)
        sequences.append(Sequence(np.concatenate(parts), scored))
    return sequences


def without_text_columns(dataset: Any) -> Any:
    """The dataset with its numeric columns (numbers and lists of numbers) alone, which is what collators take."""
    features = getattr(dataset, "features", None)
    if not features:
        return dataset

    def numeric(feature: Any) -> bool:
        while hasattr(feature, "feature"):
            feature = feature.feature
        dtype = getattr(feature, "dtype", None)
        # A column of nothing but nulls (LLaMA-Factory's `images` of text rows) is one that the collator may ask for.
        return isinstance(dtype, str) and dtype.startswith(("int", "uint", "float", "bool", "null"))

    return dataset.select_columns([name for name, feature in features.items() if numeric(feature)])
