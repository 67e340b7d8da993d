"""Refreshing by window: what is scored when, and that the trainer's batches are left as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from datasets import Dataset
from ica_plugin import attach
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

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


def run(folder: Path, ica: dict | None, resume=None, **settings) -> Recorder:
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
        "learning_rate": 0.01, "use_cpu": True, "save_strategy": "no", "report_to": "none", "seed": 3, "disable_tqdm": True,
        "logging_strategy": "no", **settings,
    }
    tokenizer = tiny.make_tokenizer()
    evaluated = tokenised(5, 5) if "eval_strategy" in settings else None
    trainer = Recorder(
        tiny.make_model(), TrainingArguments(**arguments), train_dataset=tokenised(ROWS, 0), eval_dataset=evaluated,
        data_collator=DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer,
    )
    trainer.trained = []
    if ica is not None:
        attach(trainer, {"retrieval": "random", "k": 2, **ica}, holdout=tokenised(6, 9))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def refreshes(folder: Path) -> list[tuple[int, list[int]]]:
    """(step, rows) of each refresh, by what scores.parquet says."""
    table = pq.read_table(folder / "ica" / "scores.parquet").to_pydict()
    found: dict[int, tuple[int, list[int]]] = {}
    for refresh, step, row in zip(table["refresh"], table["step"], table["row"], strict=True):
        found.setdefault(refresh, (step, []))[1].append(row)
    return [found[i] for i in sorted(found)]


def check_windows(trainer: Recorder, folder: Path) -> None:
    """Every refresh scored exactly the rows that were trained until the next one."""
    scored = refreshes(folder)
    starts = [step for step, _ in scored] + [trainer.state.global_step]
    assert starts == sorted(set(starts))
    for (step, rows), until in zip(scored, starts[1:], strict=True):
        trained = {row for at, rows_, *_ in trainer.trained for row in rows_ if step <= at < until}
        assert rows == sorted(trained)


@pytest.mark.parametrize("interval", [1, 2, 4, 100, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_each_row_is_scored_once_per_epoch(tmp_path, interval, accumulation):
    """11 batches an epoch: the last update of an epoch is short for 2 and for 3, the last window for 2 and 4."""
    trainer = run(tmp_path, {"refresh_interval": interval}, gradient_accumulation_steps=accumulation)
    check_windows(trainer, tmp_path)
    assert Counter(row for _, rows in refreshes(tmp_path) for row in rows) == {row: 2 for row in range(ROWS)}
    record = json.loads((tmp_path / "ica" / "run.json").read_text())
    assert record["scored_rows"] == 2 * ROWS and record["refreshes"] == len(refreshes(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"gradient_accumulation_steps": 3}, {"max_steps": 5}, {"dataloader_drop_last": True}, {"dataloader_num_workers": 1},
        {"eval_strategy": "steps", "eval_steps": 1}, {"train_sampling_strategy": "group_by_length"},
    ],
    ids=str,
)
def test_batches_are_handed_on_as_they_are(tmp_path, settings):
    plain = run(tmp_path / "plain", None, **settings)
    window = run(tmp_path / "window", {"refresh_interval": 3}, **settings)
    assert [(step, end, tokens) for step, _, end, tokens in window.trained] == [
        (step, end, tokens) for step, _, end, tokens in plain.trained
    ]
    check_windows(window, tmp_path / "window")


def test_max_steps_inside_a_window(tmp_path):
    trainer = run(tmp_path, {"refresh_interval": 4}, max_steps=5)
    check_windows(trainer, tmp_path)
    assert [(step, len(rows)) for step, rows in refreshes(tmp_path)] == [(0, 16), (4, 4)]


def test_max_steps_over_several_epochs(tmp_path):
    """6 updates an epoch: the second window of an epoch ends with it."""
    trainer = run(tmp_path, {"refresh_interval": 4}, max_steps=14)
    check_windows(trainer, tmp_path)
    assert [step for step, _ in refreshes(tmp_path)] == [0, 4, 6, 10, 12]


def test_scores_are_the_current_policy_s(tmp_path):
    """A window's scores differ from those of the start, since the policy has moved, and the first window's do not."""
    run(tmp_path / "once", {"refresh_interval": "never"}, num_train_epochs=1)
    run(tmp_path / "window", {"refresh_interval": 3}, num_train_epochs=1, learning_rate=0.05)
    start, later = (pq.read_table(tmp_path / name / "ica" / "scores.parquet").to_pydict() for name in ("once", "window"))
    base = dict(zip(start["row"], start["base_logprob"], strict=True))
    moved = {0: [], 1: []}
    for refresh, row, value in zip(later["refresh"], later["row"], later["base_logprob"], strict=True):
        moved[min(refresh, 1)].append(abs(value - base[row]))
    assert max(moved[0]) < 1e-3 and np.mean(moved[1]) > 0.1


@pytest.mark.parametrize("scope", ["window", "all"])
def test_resumed_runs_score_before_they_train(tmp_path, scope):
    ica = {"refresh_interval": 4, "refresh_scope": scope}
    whole = run(tmp_path / "a", ica, save_strategy="steps", save_steps=3)
    resumed = run(tmp_path / "b", ica, resume=str(tmp_path / "a" / "checkpoint-3"))
    assert [t[:2] for t in resumed.trained] == [t[:2] for t in whole.trained if t[0] >= 3]
    assert refreshes(tmp_path / "b")[0][0] == 3
    if scope == "window":
        check_windows(resumed, tmp_path / "b")


@pytest.mark.parametrize("interval, steps", [(4, [0, 4, 8]), ("epoch", [0, 6])])
def test_scope_all_scores_every_row_each_time(tmp_path, interval, steps):
    run(tmp_path, {"refresh_interval": interval, "refresh_scope": "all"})
    assert refreshes(tmp_path) == [(step, list(range(ROWS))) for step in steps]


def test_two_ranks_score_what_they_train(tmp_path):
    """torchrun with two processes: each rank scores its own rows, and both agree on the weights' scale."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    scored = refreshes(tmp_path)
    for (step, rows), until in zip(scored, [*(step for step, _ in scored[1:]), 10**9], strict=True):
        expected = {row for part in trained for at, rows_ in part for row in rows_ if step <= at < until}
        assert rows == sorted(expected)
    # accelerate fills the 12th batch of an epoch with rows of its first, which are trained, and so scored, once more
    counts = Counter(row for _, rows in scored for row in rows)
    assert set(counts) == set(range(ROWS)) and 2 <= min(counts.values()) and sum(counts.values()) <= 2 * (ROWS + 2)
    table = pq.read_table(tmp_path / "ica" / "scores.parquet").to_pandas()
    for _, part in table.groupby("refresh"):
        assert np.average(part["weight"], weights=part["tokens"]) == pytest.approx(1, abs=1e-5)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    recorded = run(folder, {"refresh_interval": 2})
    rank = recorded.accelerator.process_index
    (folder / f"rank{rank}.json").write_text(json.dumps([(step, rows) for step, rows, *_ in recorded.trained]))
