"""Builds TRL's and transformers' own trainers, in every supported version, and attaches to them."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import ica_plugin
import tiny

TRAINERS = {"sft": "SFT", "dpo": "DPO", "ipo": "DPO", "hinge": "DPO", "simpo": "CPO", "orpo": "ORPO", "kto": "KTO"}


def trl_class(name: str) -> type:
    """A class of TRL, where it has moved to `trl.experimental` too."""
    family = name.replace("Trainer", "").replace("Config", "").lower()
    for module in ("trl", f"trl.experimental.{family}"):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(name)


def sft_rows(n: int, seed: int = 0, equal: bool = False) -> list[dict]:
    """Prompt and completion as text: TRL 0.24 masks conversational prompts wrongly beside transformers 5."""
    tokenizer = tiny.make_tokenizer()
    return [
        {
            "prompt": tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True),
            "completion": row["messages"][1]["content"],
        }
        for row in tiny.sft_rows(n, seed, equal=equal)
    ]


def pair_rows(n: int, seed: int = 0, equal: bool = False) -> list[dict]:
    return [
        {"prompt": row["messages"], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}
        for row in tiny.pair_rows(n, seed, equal=equal)
    ]


def kto_rows(n: int, seed: int = 0) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in tiny.kto_rows(n, seed)
    ]


ROWS = {"sft": sft_rows, "transformers": sft_rows, "kto": kto_rows}


def tokenise(rows: list[dict]) -> Dataset:
    """Rows for a plain transformers.Trainer: input_ids and labels, the prompt masked."""
    tokenizer = tiny.make_tokenizer()

    def one(row: dict) -> dict:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        return {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": [-100] * len(prompt) + whole[len(prompt) :]}

    return Dataset.from_list([one(row) for row in rows])


def training_arguments(folder: Path, micro_batch: int, accumulation: int, max_steps: int) -> dict[str, Any]:
    """Of every trainer in these tests: one epoch on a CPU in float32, at a constant rate."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": max_steps,
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "seed": 7,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "gradient_checkpointing": False,
    }


class Maker:
    """`make_trainer` of tests/checks.py for one kind of trainer.

    `ica` is None, a block, or a function of the number of rows; without `weights` the block gets `holdout`.
    """

    def __init__(self, folder: Path, kind: str, rows: list[dict], holdout: Any = None, lora: dict | None = None, **settings: Any):
        self.folder, self.kind, self.rows, self.lora, self.settings = folder, kind, rows, lora, settings
        self.holdout = holdout if holdout is not None else ROWS.get(kind, pair_rows)(6, seed=99)
        self.built = 0

    def __call__(self, *, ica: Any, micro_batch: int = 2, accumulation: int = 1, max_steps: int = -1, **more: Any) -> Trainer:
        self.built += 1
        folder = self.folder / str(self.built)
        arguments = training_arguments(folder, micro_batch, accumulation, max_steps) | self.settings | more
        model = tiny.make_model()
        model.warnings_issued = {}  # as `from_pretrained` leaves it
        trainer = self._transformers(model, arguments) if self.kind == "transformers" else self._trl(model, arguments)
        block = ica(len(self.rows)) if callable(ica) else ica
        if block is not None:
            holdout = None if "weights" in block else self.holdout
            holdout = Dataset.from_list(holdout) if isinstance(holdout, list) else holdout
            ica_plugin.attach(trainer, tiny.NAMED | block, holdout=holdout)
        return trainer

    def _transformers(self, model: Any, arguments: dict) -> Trainer:
        if isinstance(self.holdout, list):
            self.holdout = tokenise(self.holdout)
        tokenizer = tiny.make_tokenizer()
        if self.lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(**self.lora))
        return Trainer(
            model,
            TrainingArguments(**arguments),
            train_dataset=tokenise(self.rows),
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )

    def _trl(self, model: Any, arguments: dict) -> Trainer:
        family = TRAINERS[self.kind]
        config = trl_class(f"{family}Config")
        known = inspect.signature(config).parameters
        defaults = {"max_length": 256, "max_prompt_length": 128, "beta": 0.5, "disable_dropout": True}
        if self.kind in ("ipo", "hinge", "simpo"):
            arguments.setdefault("loss_type", self.kind)
        if self.kind == "simpo":
            defaults |= {"cpo_alpha": 0.0, "simpo_gamma": 0.5}
        if self.kind == "sft":
            # In TRL ≥ 1.9 the default loss is a fused one, exact for a frozen output embedding alone.
            defaults |= {"loss_type": "nll"}
        arguments = {**{key: value for key, value in defaults.items() if key in known}, **arguments}
        extra = {}
        if self.lora:
            from peft import LoraConfig

            extra["peft_config"] = LoraConfig(**self.lora)
        if "ref_model" in inspect.signature(trl_class(f"{family}Trainer")).parameters and not self.lora:
            reference = tiny.make_model()
            reference.warnings_issued = {}
            extra["ref_model"] = reference
        return trl_class(f"{family}Trainer")(
            model,
            args=config(**arguments),
            train_dataset=Dataset.from_list(self.rows),
            processing_class=tiny.make_tokenizer(),
            **extra,
        )
