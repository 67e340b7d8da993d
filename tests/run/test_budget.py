"""`budget`: what scoring may take, which rows it reaches, and what the others get."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from checks import callback_of
from ica_plugin.config import parse_config
from ica_plugin.errors import ICAError
from ica_plugin.run import budget as budget_module
from ica_plugin.run.budget import Allowance, affordable, spread
from ica_plugin.run.files import RunFiles
from processes import torchrun
from runs import ROWS, refreshes, run


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, "much"])
def test_budget_is_a_share(value):
    with pytest.raises(ICAError, match="ica.budget"):
        parse_config({"holdout": "x", "budget": value})


@pytest.mark.parametrize("n", [1, 7, 100])
def test_spread_is_even(n):
    order = spread(n)
    assert sorted(order) == list(range(n))
    for start in (0, n // 3):
        part = np.sort(order[start : start + max(n // 5, 1)])
        assert np.diff(np.concatenate([[-1], part, [n]])).max() <= 4 * n / len(part)


def test_affordable_prompts():
    prompts = [np.zeros(10, int)] * 20
    assert len(affordable(prompts, 0.1, 5.0, 3)) == 5
    assert len(affordable(prompts, 0.1, 0.0, 3)) == 3
    assert affordable(prompts, 0.1, 1e9, 3) == list(range(20))


# Time, with a clock of our own.


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def wait(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: clock.now)
    return clock


def test_allowance_is_a_share_of_estimated_and_then_of_measured_time(clock):
    allowance = Allowance(0.1, 0, 100)
    allowance.open(0, 100)
    allowance.step_seconds = 1.0
    assert allowance.whole == pytest.approx(10) and allowance.left == pytest.approx(10)
    clock.wait(4)
    allowance.set_up()
    assert allowance.left == pytest.approx(6)
    clock.wait(1)
    allowance.close()
    clock.wait(100)  # fifty steps that took two seconds each
    allowance.open(50, 100)
    assert allowance.left == pytest.approx(0.1 * 200 - 5)


def test_setup_is_charged_evenly_over_windows(clock):
    allowance = Allowance(0.1, 0, 100)
    allowance.open(0, 10)
    allowance.step_seconds = 1.0
    clock.wait(5)
    allowance.set_up()
    assert allowance.left == pytest.approx(1 - 0.5)
    clock.wait(0.5)
    allowance.close()
    clock.wait(10)
    allowance.open(10, 20)
    assert allowance.left == pytest.approx(2 - 0.5 - 1)


def test_rows_by_what_rows_took(clock):
    allowance = Allowance(0.1, 0, 100)
    allowance.open(0, 100)
    allowance.step_seconds = 1.0
    assert allowance.rows(0.5) == 5  # a quarter of ten seconds
    assert allowance.rows(9.0) == 1 and allowance.rows(11.0) == 0
    clock.wait(2)
    allowance.scored(20, 2.0)
    assert allowance.rows(0.5) == int(0.9 * 80)


def test_what_comes_after_scoring_is_kept_back_of_the_next_refresh(clock):
    allowance = Allowance(0.1, 0, 100)
    allowance.open(0, 50)
    allowance.step_seconds = 1.0
    allowance.scored(10, 1.0)
    clock.wait(3)  # weights are given and files are written
    allowance.close()
    clock.wait(50)
    allowance.open(50, 100)
    assert allowance.left == pytest.approx(10 - 3) and allowance.rows(1.0) == int(0.9 * (7 - 3) * 10)


# Whole runs.


def record(folder) -> dict:
    return json.loads((folder / "ica" / "run.json").read_text())


@pytest.mark.parametrize("interval", ["never", "epoch", 20, 0.1])
def test_scoring_stays_within_its_share(tmp_path, interval):
    """220 steps; both sides of the ratio slow down alike on a busy machine."""
    run(
        tmp_path,
        {"refresh_interval": interval, "budget": 0.05, "retrieval": "policy"},
        num_train_epochs=20,
        gradient_accumulation_steps=1,
    )
    found = record(tmp_path)
    assert found["steps"] == 220
    # These runs take a second, so that what no budget foresees (a slow write) counts beside it.
    assert found["scoring_seconds"] <= 0.06 * found["training_seconds"] + 0.05
    table = pq.read_table(tmp_path / "ica" / "scores.parquet").to_pandas()
    assert table["score"].notna().sum() == found["scored_rows"]
    for _, part in table.groupby("refresh"):
        assert np.average(part["weight"], weights=part["tokens"]) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(table["score"].notna(), table["demos"].map(len) > 0)


def test_the_time_that_files_take_is_scoring_time(tmp_path, monkeypatch):
    """It was taken for training time, of which the budget is a share: the more was written, the more was scored."""
    now, late = time.monotonic, [0.0]
    add_scores = RunFiles.add_scores

    def slowly(*args, **kwargs):
        add_scores(*args, **kwargs)
        late[0] += 50

    monkeypatch.setattr(RunFiles, "add_scores", slowly)
    monkeypatch.setattr(time, "monotonic", lambda: now() + late[0])
    run(tmp_path, {"refresh_interval": "epoch", "budget": 0.5}, num_train_epochs=3, gradient_accumulation_steps=1)
    found = record(tmp_path)
    assert found["scoring_seconds"] > 150 and found["training_seconds"] < 50
    table = pq.read_table(tmp_path / "ica" / "scores.parquet").to_pandas()
    assert table["refresh"].nunique() == 3 and table.loc[table["refresh"] > 0, "score"].isna().all()


def test_a_large_budget_scores_every_row_as_without_one(tmp_path):
    run(tmp_path / "budget", {"budget": 0.99}, num_train_epochs=100, max_steps=400, gradient_accumulation_steps=1)
    run(tmp_path / "plain", {}, max_steps=1)
    assert record(tmp_path / "budget")["scored_share"] == 1
    ours, plain = (pq.read_table(tmp_path / name / "ica" / "scores.parquet").to_pandas() for name in ("budget", "plain"))
    np.testing.assert_allclose(ours["score"], plain["score"], atol=1e-4)
    np.testing.assert_allclose(ours["weight"], plain["weight"], atol=1e-4)
    assert refreshes(tmp_path / "budget")[0][1] == list(range(ROWS))


def test_a_resumed_run_remembers_scored_rows(tmp_path):
    settings = dict(num_train_epochs=10, gradient_accumulation_steps=1, save_strategy="steps", save_steps=55)
    ica = {"refresh_interval": 10, "budget": 0.3}
    whole = callback_of(run(tmp_path / "a", ica, **settings))
    resumed = callback_of(run(tmp_path / "b", ica, resume=str(tmp_path / "a" / "checkpoint-55"), **settings))
    first, second = whole.state.counts, resumed.state.counts
    assert first.refreshes == second.refreshes and first.weighted_rows == second.weighted_rows
    assert not resumed.weights.isnan().any()
    assert np.isfinite(resumed.state.scores).sum() > 0


@pytest.mark.slow
def test_two_ranks_agree(tmp_path):
    done = torchrun(__file__, 2, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (np.load(tmp_path / f"rank{rank}.npy") for rank in range(2))
    assert np.array_equal(first, second) and not np.isnan(first).any()
    assert 0 < record(tmp_path)["scored_share"] < 1


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainer = run(folder, {"refresh_interval": 20, "budget": 0.05}, num_train_epochs=20, gradient_accumulation_steps=1)
    np.save(folder / f"rank{trainer.accelerator.process_index}.npy", callback_of(trainer).weights.numpy())
