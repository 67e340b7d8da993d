"""Refreshing by window: what is scored when, and that the trainer's batches are left as they are."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import GradientState

import tiny
from checks import callback_of, parameters
from ica_plugin.data.row_ids import ROW_IDS
from ica_plugin.run.look_ahead import LookAhead
from ica_plugin.scorers import scores_for_sets
from ica_plugin.tools.sample import Sample
from processes import torchrun
from runs import ROWS, Recorder, build, refreshes, run


def check_windows(trainer: Recorder, folder: Path) -> None:
    """Every refresh scored exactly the rows that were trained until the next one."""
    scored = refreshes(folder)
    starts = [step for step, _ in scored] + [trainer.state.global_step]
    assert starts == sorted(set(starts))
    for (step, rows), until in zip(scored, starts[1:], strict=True):
        trained = {row for at, rows_, *_ in trainer.trained for row in rows_ if step <= at < until}
        assert rows == sorted(trained)


def test_a_window_of_few_rows_is_warned_about(tmp_path, capfd):
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 3}
    run(tmp_path / "one", {"refresh_interval": 1}, **settings)
    assert "a window is 1 row(s), " in (said := capfd.readouterr().err) and "every weight is 1" in said
    run(tmp_path / "few", {"refresh_interval": 3}, **settings)
    assert "a window is 3 row(s), " in capfd.readouterr().err
    run(tmp_path / "all", {"refresh_interval": 1, "refresh_scope": "all"}, **settings)
    assert "a window" not in capfd.readouterr().err


def test_batches_that_wait_do_so_in_the_cpus_memory():
    """`meta` stands for a GPU: what was drawn can be read until it is handed on."""
    ahead = LookAhead(GradientState(), torch.device("meta"))
    batches = iter([{ROW_IDS: torch.tensor([1, 0]), "input_ids": torch.ones(2, 3)}, {ROW_IDS: torch.tensor([2])}])
    ahead.draw(batches, 1)
    assert ahead.rows == [0, 1]
    first, second = ahead.hand_on(batches)
    assert {value.device.type for value in first.values()} == {"meta"} and first["input_ids"].shape == (2, 3)
    assert second[ROW_IDS].tolist() == [2], "never drawn ahead"


def test_a_second_train_with_another_model_scores_that_one(tmp_path):
    trainer = build(tmp_path, {"retrieval": "policy"}, max_steps=3)
    trainer.model_init = lambda: tiny.make_model()
    trainer.train()
    first = callback_of(trainer).state.scores.clone()
    trainer.train()
    assert callback_of(trainer).scoring.engine.model is trainer.model
    torch.testing.assert_close(callback_of(trainer).state.scores, first, atol=1e-4, rtol=0)


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
        {},
        {"gradient_accumulation_steps": 3},
        {"max_steps": 5},
        {"dataloader_drop_last": True},
        {"dataloader_num_workers": 1},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"train_sampling_strategy": "group_by_length"},
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


@pytest.mark.parametrize("interval, steps", [(4, [0, 4, 8]), ("epoch", [0, 6])])
def test_scope_all_scores_every_row_each_time(tmp_path, interval, steps):
    run(tmp_path, {"refresh_interval": interval, "refresh_scope": "all"})
    assert refreshes(tmp_path) == [(step, list(range(ROWS))) for step in steps]


@pytest.mark.slow
def test_two_ranks_score_what_they_train(tmp_path):
    """torchrun with two processes: each rank scores its own rows, and both agree on the weights' scale."""
    done = torchrun(__file__, 2, tmp_path)
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


def test_an_evaluation_does_not_change_what_a_schedule_free_optimizer_s_run_scores(tmp_path):
    """Its averaged weights are in the model after an evaluation; the weights that are trained are scored all the same."""
    settings = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 0.05}
    block = {"refresh_interval": 4, "refresh_scope": "all"}
    evaluated = {"eval_strategy": "steps", "eval_steps": 4}
    plain, other = (run(tmp_path / name, block, **settings, **more) for name, more in (("plain", {}), ("eval", evaluated)))
    found = [pq.read_table(tmp_path / name / "ica" / "scores.parquet") for name in ("plain", "eval")]
    assert found[0]["step"].to_pylist() == found[1]["step"].to_pylist() and max(found[0]["step"].to_pylist()) >= 8
    np.testing.assert_allclose(found[0]["score"].to_numpy(), found[1]["score"].to_numpy(), atol=2e-2)
    # Whoever asks: a sample of the audit too.
    callback, rows = callback_of(other), list(range(ROWS))
    shown = callback.state.shown(rows)
    trained = callback.scoring.score(rows, shown)["ica"]
    other.optimizer.eval()
    sample = Sample(callback, rows)
    sample.score(["ica"])
    np.testing.assert_allclose(sample.columns["ica"], trained, atol=1e-4)
    # What is saved after training are the averaged weights, also after a refresh.
    other.optimizer.eval()
    before = parameters(other)
    callback.refresh(rows, shared=True)
    for name, value in parameters(other).items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-4)
    # The averaged weights score otherwise by far, so the comparisons can fail.
    context = callback.scoring.context(rows, shown)
    other.optimizer.eval()
    averaged = scores_for_sets(context)["ica"]
    assert np.abs(trained - averaged).max() > 0.2
