"""Axolotl: the plugin class, the `ica:` block in its schema, and the holdout through its own loaders."""

from __future__ import annotations

import copy
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import load_tokenizer
from axolotl.train import setup_model_and_trainer
from axolotl.utils.data import prepare_datasets, prepare_preference_datasets
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from pydantic import BaseModel, ValidationError, model_validator
from transformers import AutoConfig

from ..callback import ICACallback
from ..config import ICAConfig, parse_config
from ..errors import ICAError
from ..examples import Example, read_examples
from ..holdout import check_holdout, joined, json_error
from ..versions import warn_if_untested
from ..weights_file import read_weights
from .trainer import SHARDED, attach_examples, prepare_like_train

SUPPORTED_RL = ("dpo", "ipo", "simpo", "orpo", "kto")
UNSUPPORTED_KEYS = {
    "kd_trainer": "distillation's loss passes by the model's own output, where weights act",
    "diffusion": "rows are scored by causal log-probs, which a diffusion model does not have",
    "use_ray": "Ray trains in processes of its own",
    "balance_labels": "its sampler asks for the host's own collator, which the plugin wraps",
}
# Keys of a dataset entry that say where its rows are; the others say how to read them.
LOCATION_KEYS = {"path", "name", "split", "data_files", "ds_type", "revision", "shards", "shards_idx", "preprocess_shards"}
LOCAL_ENDINGS = {".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt"}


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


class ICAPlugin(BasePlugin):
    """Weights every training row by its ICA score. See docs/quickstart.md."""

    def get_input_args(self) -> str:
        return "ica_plugin.hosts.axolotl.ICAArgs"

    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        warn_if_untested("axolotl")
        refuse_unsupported(cfg)
        config = config_of(cfg)
        attach_examples(trainer, config, read_holdout=lambda one: _read_holdout(cfg, one, trainer), moved_rows=_moved_rows(cfg))


def _moved_rows(cfg: DictDefault) -> str:
    """Why the train rows do not stand as in the data file; "" where they do."""
    if not (cfg.shuffle_merged_datasets or cfg.shuffle_before_merging_datasets or cfg.val_set_size):
        return ""
    return "Axolotl shuffles them (not with `shuffle_merged_datasets: false` and `val_set_size: 0`)"


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
        raise ICAError("reward models are not supported by ica_plugin: their loss has no response log-prob to weight.")
    if cfg.streaming or cfg.pretraining_dataset:
        raise ICAError(
            "streaming and `pretraining_dataset` are not supported by ica_plugin: rows need a fixed index to keep a weight "
            "under. List the data under `datasets` without `streaming`."
        )
    if (cfg.context_parallel_size or 1) > 1:
        raise ICAError("context_parallel_size > 1 is not supported by ica_plugin: rows are split over ranks. Set it to 1.")
    for key in ("deepspeed", "fsdp", "fsdp_config", "tensor_parallel_size", "expert_parallel_size"):
        if cfg[key] and cfg[key] != 1:
            raise ICAError(f"{key} {SHARDED}")
    for key, why in UNSUPPORTED_KEYS.items():
        if cfg[key]:
            raise ICAError(f"{key} is not supported by ica_plugin: {why}.")


def holdout_entry(cfg: DictDefault, holdout: str | dict[str, Any]) -> tuple[str, DictDefault]:
    """The holdout as an entry under `datasets`.

    A path or hub id is read as the run's first dataset is; so is an entry without a `type`.

    Returns:
        (name for messages, entry).

    Raises:
        ICAError: an entry without a path, or a local file that is not there.
    """
    given = {"path": holdout} if isinstance(holdout, str) else {k: v for k, v in holdout.items() if v is not None}
    if not given.get("path"):
        raise ICAError("ica.holdout: the dataset entry has no `path`.")
    path = Path(given["path"])
    local = path.suffix in LOCAL_ENDINGS or given["path"].startswith((".", "/", "~"))
    if local and not path.exists():
        raise ICAError(f"ica.holdout: {given['path']}: no such file or folder (looked for {path.absolute()}).")
    reading = {}
    if "type" not in given and cfg.datasets:
        reading = {k: v for k, v in dict(cfg.datasets[0]).items() if k not in LOCATION_KEYS}
    return given["path"], DictDefault({**reading, **given})


def load_holdout(cfg: DictDefault, config: ICAConfig, tokenizer: Any) -> tuple[str, Dataset]:
    """Read the holdout through Axolotl's own loaders and prompt strategies.

    Args:
        cfg: the run's validated config.
        config: the block.
        tokenizer: the run's.

    Returns:
        (name for messages, rows): tokenised for SFT; prompt, chosen, … as text for preference runs.

    Raises:
        ICAError: the holdout cannot be read as the run's data is.
    """
    source, entry = holdout_entry(cfg, config.holdout)
    with tempfile.TemporaryDirectory() as prepared:
        run = DictDefault(copy.deepcopy(dict(cfg)))
        run.update(
            datasets=[entry],
            test_datasets=None,
            val_set_size=0,
            sample_packing=False,
            shuffle_merged_datasets=False,
            dataset_exact_deduplication=False,
            excess_length_strategy="raise",
            dataset_prepared_path=prepared,
            push_dataset_to_hub=None,
            skip_prepare_dataset=False,
            # A step count for the holdout means nothing, but the loaders compute one.
            max_steps=None,
        )
        try:
            if cfg.rl:
                rows, _ = prepare_preference_datasets(run, tokenizer)
            else:
                rows, *_ = prepare_datasets(run, tokenizer)
        except Exception as error:
            malformed = json_error(source)
            if malformed:
                raise ICAError(f"ica.holdout: malformed json: {malformed}. Correct or remove that line.") from error
            raise ICAError(f"ica.holdout: {source}: {_explain(error, cfg)}") from error
    if len(rows) == 0:
        raise ICAError(
            f"ica.holdout: {source} has no rows with a supervised token under `type: {entry.type}`. Give at least one good "
            "example; 50 to 500 serve well."
        )
    return source, rows


def _explain(error: Exception, cfg: DictDefault) -> str:
    text = f"{type(error).__name__}: {error}"
    causes = [text]
    while (error := error.__cause__ or error.__context__) is not None:
        causes.append(f"{type(error).__name__}: {error}")
    everything = " | ".join(dict.fromkeys(causes))
    lowered = everything.lower()
    if "sequence_len" in lowered or "longer than" in lowered or "exceeds" in lowered:
        return f"a row is longer than the run's context (sequence_len: {cfg.sequence_len}). Shorten or remove it. ({everything})"
    if cfg.rl and any(word in lowered for word in ("chosen", "rejected", "completion", "label")):
        return (
            f"a {cfg.rl} run needs holdout rows with the same fields as its training data "
            f"({'prompt, completion and label' if cfg.rl == 'kto' else 'a prompt, `chosen` and `rejected`'}). ({everything})"
        )
    return (
        "it could not be read the way the run's first dataset is. Give it the same format, or a full dataset entry with its "
        f"own `type`. ({everything})"
    )


def _read_holdout(cfg: DictDefault, config: ICAConfig, trainer: Any) -> tuple[str, list[Example]]:
    source, rows = load_holdout(cfg, config, trainer.processing_class)
    if cfg.rl:
        rows = prepare_like_train(trainer, rows)
    return source, read_examples(rows, trainer.data_collator)


def validate(path: Path) -> dict[str, Any]:
    """Check a config, its train rows and its holdout without loading the model.

    Returns:
        what was found, by name.

    Raises:
        ICAError: what is wrong.
    """
    warn_if_untested("axolotl")
    try:
        cfg = load_cfg(str(path))
    except ValidationError as error:
        raise ICAError(str(error)) from None
    refuse_unsupported(cfg)
    config = config_of(cfg)
    tokenizer = load_tokenizer(cfg)
    train = (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg).train_dataset
    found = {"rows": len(train)}
    if config.weights is not None:
        weights = read_weights(config.weights, len(train)) if config.weights not in train.column_names else train[config.weights]
        return {**found, "weights": f"{config.weights}, mean {sum(weights) / len(weights):.3g}"}
    sets = {name: load_holdout(cfg, one, tokenizer) for name, one in config.sets.items()}
    found["holdout rows"] = ", ".join(f"{len(rows)} ({source})" for source, rows in sets.values())
    if not cfg.rl:  # preference rows are tokenised by the trainer, which needs the model
        model = AutoConfig.from_pretrained(
            cfg.base_model, revision=cfg.revision_of_model or "main", trust_remote_code=bool(cfg.trust_remote_code)
        ).get_text_config()
        context, rows_of_run = getattr(model, "max_position_embeddings", None), read_examples(train, _one_row)
        holdout = joined(
            {
                name: check_holdout(source, read_examples(rows, _one_row), rows_of_run, context)
                for name, (source, rows) in sets.items()
            }
        )
        found["usable as demonstrations"] = len(holdout.shown)
        found["train rows that are also in the holdout"] = holdout.rows_in_train
    return {**found, "block": config.model_dump(exclude_none=True)}


def attached(path: Path, changes: dict[str, Any]) -> tuple[ICACallback, tuple[np.ndarray, int] | None]:
    """The trainer that `axolotl train` would build, with the plugin attached, and nothing trained.

    Args:
        path: the config.
        changes: keys of the `ica:` block that replace the config's.

    Returns:
        the callback, and for each train row its place in the data as it lies in the file (−1 where that is unknown) with the
        number of rows there; None where the trainer's rows are not those that were loaded.

    Raises:
        ICAError: what is wrong with the config.
    """
    warn_if_untested("axolotl")
    try:
        cfg = load_cfg(str(path))
    except ValidationError as error:
        raise ICAError(str(error)) from None
    cfg.ica = parse_config({**config_of(cfg).model_dump(exclude_unset=True), "weights": None, **changes}).model_dump(
        exclude_unset=True
    )
    load = load_preference_datasets if cfg.rl else load_datasets
    data = load(cfg=cfg)
    with tempfile.TemporaryDirectory() as folder:
        cfg.output_dir = folder
        trainer, *_ = setup_model_and_trainer(cfg, data)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ICACallback))
    if len(data.train_dataset) != len(callback.train):
        return callback, None
    with tempfile.TemporaryDirectory() as prepared:
        run = DictDefault(copy.deepcopy(dict(cfg)))
        # As it lies in the file: neither shuffled nor thinned.
        run.update(
            shuffle_merged_datasets=False,
            shuffle_before_merging_datasets=False,
            dataset_exact_deduplication=False,
            test_datasets=None,
            val_set_size=0,
            excess_length_strategy="truncate",
            dataset_prepared_path=prepared,
            push_dataset_to_hub=None,
        )
        in_file = [_content(row) for row in load(cfg=run).train_dataset]
    places: dict[str, deque[int]] = {}
    for place, content in enumerate(in_file):
        places.setdefault(content, deque()).append(place)
    source = [places[content].popleft() if places.get(content := _content(row)) else -1 for row in data.train_dataset]
    return callback, (np.array(source), len(in_file))


def _content(row: dict[str, Any]) -> str:
    return repr(sorted((key, value) for key, value in row.items() if value is not None))


def _one_row(features: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([features[0][key]]) for key in ("input_ids", "attention_mask", "labels")}
