"""What the plugin adds to Axolotl's schema, and what it refuses by the config alone."""

from __future__ import annotations

from typing import Any

from axolotl.utils.dict import DictDefault
from pydantic import BaseModel, field_serializer, model_validator

from ...config import ICAConfig, parse_config
from ...data.store import Kind
from ...errors import ICAError
from ...training.refusals import CHOOSE_ROWS, SHARDED

SUPPORTED_RL = ("dpo", "ipo", "simpo", "orpo", "kto")


UNSUPPORTED_KEYS = {
    "kd_trainer": "distillation's loss passes by the model's own output, where weights act",
    "diffusion": "rows are scored by causal log-probs, which a diffusion model does not have",
    "use_ray": "Ray trains in processes of its own",
    "balance_labels": "its sampler asks for the host's own collator, which the plugin wraps",
}

# Keys of an entry of `datasets` by which Axolotl shuffles its rows, or takes some of them, and the value without which it does not.
DATASET_MOVES = {"shards": None, "preprocess_shards": None, "weight": None}


class ICAArgs(BaseModel):
    """What the plugin adds to Axolotl's schema."""

    ica: ICAConfig

    @model_validator(mode="before")
    @classmethod
    def _require_block(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("ica") is None:
            raise ValueError(
                "`plugins` lists ica_plugin.ICAPlugin but there is no `ica:` block. Add `ica:` with at least "
                "`holdout: <path>`, or take the plugin out of the list."
            )
        return data

    @field_serializer("ica")
    def _as_given(self, ica: ICAConfig) -> dict[str, Any]:
        # Axolotl keeps its validated config as a plain dict and hands that to the plugin. With every default written out it could not
        # be told any more which keys a user gave, and `weighting: auto` follows the one that was given.
        return ica.model_dump(exclude_unset=True)


def config_of(cfg: DictDefault) -> ICAConfig:
    """The `ica:` block of an Axolotl config.

    Raises:
        ICAError: a wrong key.
    """
    block = cfg.ica
    return parse_config(block.to_dict() if isinstance(block, DictDefault) else block)


def refuse_unsupported(cfg: DictDefault) -> None:
    """Raise ICAError for trainings that have no per-row loss to weight."""
    if cfg.rl and str(getattr(cfg.rl, "value", cfg.rl)) not in SUPPORTED_RL:
        raise ICAError(f"rl: {cfg.rl} is not supported by ica_plugin; supported: SFT (no `rl`), {', '.join(SUPPORTED_RL)}.")
    if cfg.reward_model or cfg.process_reward_model:
        raise ICAError(
            "reward models are not supported by ica_plugin: their loss has no response log-prob to weight. Or choose pairs beforehand: "
            "`ica-plugin score` with a config of the same data as `rl: dpo`, `ica-plugin select`, and train what was selected without "
            "the plugin."
        )
    if cfg.streaming or cfg.pretraining_dataset:
        raise ICAError(
            "streaming and `pretraining_dataset` are not supported by ica_plugin: rows need a fixed index to keep a weight "
            f"under. List the data under `datasets` without `streaming`. {CHOOSE_ROWS}"
        )
    if (cfg.context_parallel_size or 1) > 1:
        raise ICAError(
            f"context_parallel_size > 1 is not supported by ica_plugin: rows are split over ranks. Set it to 1. {CHOOSE_ROWS}"
        )
    for key in ("deepspeed", "fsdp", "fsdp_config", "tensor_parallel_size", "expert_parallel_size"):
        if cfg[key] and cfg[key] != 1:
            raise ICAError(f"{key} {SHARDED}")
    for key, why in UNSUPPORTED_KEYS.items():
        if cfg[key]:
            raise ICAError(f"{key} is not supported by ica_plugin: {why}. {CHOOSE_ROWS}")
    if cfg.ica:
        config_of(cfg).check_kind(kind_of(cfg))


def kind_of(cfg: DictDefault) -> Kind:
    """What the rows of an Axolotl config are."""
    if not cfg.rl:
        return "sft"
    return "unpaired" if str(getattr(cfg.rl, "value", cfg.rl)) == "kto" else "pair"


def moved_rows(cfg: DictDefault) -> str:
    """Why the train rows do not stand as in the data file, and without which keys they do; "" where they do."""
    reasons = []
    if cfg.shuffle_merged_datasets or cfg.shuffle_before_merging_datasets or cfg.val_set_size:
        reasons.append("Axolotl shuffles them (not with `shuffle_merged_datasets: false` and `val_set_size: 0`)")
    found = [key for key, neutral in DATASET_MOVES.items() if any(one.get(key) not in (neutral, 1) for one in cfg.datasets or [])]
    if found:
        reasons.append(
            f"Axolotl takes a shuffled part of the data (not without {', '.join(f'`datasets[].{key}`' for key in found)})"
        )
    if cfg.dataset_shard_num:
        reasons.append("Axolotl takes a part of the data (not without `dataset_shard_num`)")
    return "; ".join(reasons)
