"""A collated batch of any host → rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import ICAError
from .store import Example, Sequence


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
        ICAError: unknown layout.
    """
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
