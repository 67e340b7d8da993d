"""Builds LLaMA-Factory's own trainers in this process, by its own `run_exp`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llamafactory.train import tuner
from transformers import Trainer

import tiny
from ica_plugin.config import parse_config
from ica_plugin.hosts.llamafactory.attach import attach

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target": "all"}


def kto_rows(n: int, seed: int = 0) -> list[dict]:
    """LLaMA-Factory's KTO rows: one answer and its tag."""
    return [
        {
            "messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in tiny.kto_rows(n, seed)
    ]


ROWS = {"sft": tiny.sft_rows, "kto": kto_rows}


def dataset_entry(kind: str, file_name: str, media: tuple[str, ...] = ()) -> dict[str, Any]:
    """How dataset_info.json describes rows of this kind, with these columns of images and videos."""
    entry: dict[str, Any] = {"file_name": file_name, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS}
    if kind == "kto":
        entry["columns"]["kto_tag"] = "label"
    elif kind != "sft":
        entry |= {"ranking": True, "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}}
    entry["columns"] |= {column: column for column in media}
    return entry


def write_data(folder: Path, kind: str, rows: list[dict], holdout: list[dict]) -> None:
    """train.jsonl, holdout.jsonl and a dataset_info.json that names them `train` and `good`."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_jsonl(folder / "train.jsonl", rows)
    tiny.write_jsonl(folder / "holdout.jsonl", holdout)
    media = tuple(column for column in ("images", "videos") if column in rows[0])
    info = {"train": dataset_entry(kind, "train.jsonl", media), "good": dataset_entry(kind, "holdout.jsonl", media)}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def run_args(folder: Path, model: Path, kind: str, **settings: Any) -> dict[str, Any]:
    """A LLaMA-Factory config. `kind`: sft, kto, or a `pref_loss`."""
    args = {
        "model_name_or_path": str(model),
        "stage": kind if kind in ("sft", "kto") else "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "train",
        "dataset_dir": str(folder),
        "template": "chatml",
        "cutoff_len": 256,
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 7,
        "pref_beta": 0.5,
        "overwrite_cache": True,
        "overwrite_output_dir": True,
        "disable_gradient_checkpointing": True,
    }
    if args["stage"] == "dpo":
        args["pref_loss"] = kind
        if kind not in ("simpo", "orpo"):
            args["ref_model"] = str(model)
    if kind == "kto":
        args["ref_model"] = str(model)
    return {key: value for key, value in {**args, **settings}.items() if value is not None}


class _Built(Exception):
    def __init__(self, trainer: Trainer):
        self.trainer = trainer


def build(args: dict[str, Any]) -> Trainer:
    """The trainer that LLaMA-Factory builds for a config, before it trains."""
    host_train = Trainer.train

    def stop(trainer: Trainer, *_: Any, **__: Any) -> None:
        raise _Built(trainer)

    Trainer.train = stop
    try:
        tuner.run_exp(dict(args))
    except _Built as built:
        return built.trainer
    finally:
        Trainer.train = host_train
    raise AssertionError("LLaMA-Factory never came to train")


class Maker:
    """`make_trainer` of tests/checks.py for one kind of LLaMA-Factory run."""

    def __init__(
        self, folder: Path, model: Path, kind: str, rows: list[dict], holdout: list[dict] | None = None, **settings: Any
    ):
        self.folder, self.model, self.kind, self.rows, self.settings = folder, model, kind, rows, settings
        self.holdout = holdout or ROWS.get(kind, tiny.pair_rows)(6, seed=99)
        self.built = 0

    def __call__(self, *, ica: Any, micro_batch: int = 2, accumulation: int = 1, max_steps: int = -1, **more: Any) -> Trainer:
        self.built += 1
        folder = self.folder / str(self.built)
        write_data(folder, self.kind, self.rows, self.holdout)
        settings = {
            **self.settings,
            **more,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": max_steps,
        }
        trainer = build(run_args(folder, self.model, self.kind, **settings))
        block = ica(len(self.rows)) if callable(ica) else ica
        if block is not None:
            attach(trainer, parse_config(({} if "weights" in block else {"holdout": "good"}) | tiny.NAMED | block))
        return trainer
