"""Small runs of a plain transformers Trainer with the plugin attached, for tests of when things happen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import tiny
from ica_plugin import attach

ROWS = 22


def tokenised(n: int, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        tokens = rng.integers(3, 400, size=rng.integers(6, 14)).tolist()
        rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": [-100] * 3 + tokens[3:]})
    return Dataset.from_list(rows)


class Recorder(Trainer):
    """Keeps what it trained on: (global step, rows, end_of_dataloader) of every micro-batch."""

    def training_step(self, model, inputs, *args, **kwargs):
        ids = inputs.get("ica_rows")
        rows = [] if ids is None else ids.tolist()
        tokens = [row[row != 0].tolist() for row in inputs["input_ids"]]
        self.trained.append((self.state.global_step, rows, self.accelerator.gradient_state.end_of_dataloader, tokens))
        return super().training_step(model, inputs, *args, **kwargs)


def build(folder: Path, ica: dict | None, train=None, holdout=None, model=None, **settings) -> Recorder:
    """A trainer of 22 rows for two epochs of six updates, with the plugin attached unless `ica` is None."""
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 3,
        "disable_tqdm": True,
        "logging_strategy": "no",
        **settings,
    }
    tokenizer = tiny.make_tokenizer()
    evaluated = tokenised(5, 5) if "eval_strategy" in settings else None
    trainer = Recorder(
        model or tiny.make_model(),
        TrainingArguments(**arguments),
        train_dataset=train or tokenised(ROWS, 0),
        eval_dataset=evaluated,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.trained = []
    if ica is not None:
        block = {"retrieval": "random", "k": 2, **tiny.NAMED, **ica}
        attach(trainer, block, **({} if "weights" in ica else {"holdout": holdout or tokenised(6, 9)}))
    return trainer


def run(folder: Path, ica: dict | None, resume=None, **settings) -> Recorder:
    """`build`, then train."""
    trainer = build(folder, ica, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def refreshes(folder: Path) -> list[tuple[int, list[int]]]:
    """(step, rows) of each refresh, by what scores.parquet says."""
    table = pq.read_table(folder / "ica" / "scores.parquet").to_pydict()
    found: dict[int, tuple[int, list[int]]] = {}
    for refresh, step, row in zip(table["refresh"], table["step"], table["row"], strict=True):
        found.setdefault(refresh, (step, []))[1].append(row)
    return [found[i] for i in sorted(found)]
