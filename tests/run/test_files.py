"""Scores on disk: a part for each refresh, one file in the end, readable at any time."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

import tiny
from checks import callback_of
from ica_plugin import attach
from ica_plugin.data.scores import read_scores, score_files
from ica_plugin.data.weights_file import read_weights
from ica_plugin.run.files import RunFiles
from ica_plugin.tools.report import write_report
from runs import ROWS, build, run, tokenised


def refresh(number: int, rows: int = 4, **further) -> dict:
    return {
        "row": np.arange(rows),
        "refresh": np.full(rows, number),
        "step": np.full(rows, 10 * number),
        "base_logprob": np.full(rows, -1.0),
        "context_logprob": np.full(rows, -0.5),
        "score": np.arange(rows) + number / 10,
        "weight": np.full(rows, 1.0 + number),
        "tokens": np.full(rows, 7),
        "demos": [[1, 2]] * rows,
        "draws": np.ones(rows, int),
        **further,
    }


def written_bytes(monkeypatch, files: RunFiles, refreshes: int) -> int:
    """What `refreshes` refreshes write in all."""
    host, sizes = pq.write_table, []

    def counted(table, path, *args, **kwargs):
        host(table, path, *args, **kwargs)
        sizes.append(path.stat().st_size)

    monkeypatch.setattr("ica_plugin.run.files.pq.write_table", counted)
    for number in range(refreshes):
        files.add_scores(refresh(number, 64))
    monkeypatch.undo()
    return sum(sizes)


def test_a_refresh_writes_its_own_rows_alone(tmp_path, monkeypatch):
    few, many = (written_bytes(monkeypatch, RunFiles(tmp_path / str(n)), n) for n in (10, 40))
    assert many < 4.2 * few, "four times the refreshes, four times the bytes"


def test_parts_are_read_with_the_file_and_become_one_in_the_end(tmp_path):
    files = RunFiles(tmp_path)
    files.moved_rows = "shuffled"
    for number in range(12):
        files.add_scores(refresh(number, **({"rds": np.ones(4)} if number > 5 else {})))
    before = read_scores(tmp_path / "ica" / "scores.parquet")
    assert len(score_files(tmp_path / "ica")) == 12 and before["refresh"].to_pylist() == sorted([*range(12)] * 4)
    assert read_weights(str(tmp_path / "ica" / "scores.parquet"), 4).tolist() == [12.0] * 4
    files.merge()
    assert sorted(path.name for path in (tmp_path / "ica").iterdir()) == ["scores.parquet"]
    after = pq.read_table(tmp_path / "ica" / "scores.parquet")
    assert after.select(before.column_names).to_pylist() == before.to_pylist()
    assert after["rds"].null_count == 24 and after.schema.metadata[b"ica_moved_rows"] == b"shuffled"


def test_a_resumed_run_keeps_what_it_goes_on_with(tmp_path):
    for merged in (False, True):
        files = RunFiles(tmp_path / str(merged))
        for number in range(5):
            files.add_scores(refresh(number))
        if merged:
            files.merge()
        again = RunFiles(tmp_path / str(merged))
        again.keep_scores(3)
        again.add_scores(refresh(3))
        table = read_scores(tmp_path / str(merged) / "ica" / "scores.parquet")
        assert table["refresh"].to_pylist() == sorted([*range(4)] * 4)


def test_a_new_run_in_the_same_folder_begins_anew(tmp_path):
    files = RunFiles(tmp_path)
    for number in range(3):
        files.add_scores(refresh(number))
    RunFiles(tmp_path).add_scores(refresh(0, 2))
    assert len(read_scores(tmp_path / "ica" / "scores.parquet")) == 2


def test_a_damaged_part_is_named_and_the_others_stay(tmp_path, capfd):
    files = RunFiles(tmp_path)
    for number in range(3):
        files.add_scores(refresh(number))
    part = score_files(tmp_path / "ica")[1]
    part.write_bytes(part.read_bytes()[:20])
    RunFiles(tmp_path).keep_scores(3)
    assert "000001.parquet cannot be read" in capfd.readouterr().err
    assert set(read_scores(tmp_path / "ica" / "scores.parquet")["refresh"].to_pylist()) == {0, 2}


@pytest.mark.parametrize("merged", [False, True])
def test_draws_are_of_the_newest_refresh(tmp_path, merged):
    files = RunFiles(tmp_path)
    for number in range(3):
        files.add_scores(refresh(number))
    if merged:  # as where a run that ended goes on
        files.merge()
        files = RunFiles(tmp_path)
        files.keep_scores(3)
    files.set_draws(np.array([0, 3, 1, 0, 9]))
    files.merge()
    table = pq.read_table(tmp_path / "ica" / "scores.parquet")
    assert table["draws"].to_pylist() == [1] * 8 + [0, 3, 1, 0] and table["refresh"].to_pylist() == sorted([*range(3)] * 4)


@pytest.mark.parametrize("steps", [None, 7])
def test_a_run_that_ended_has_one_file_and_a_report(tmp_path, steps):
    trainer = run(tmp_path, {"refresh_interval": 2}, **({} if steps is None else {"max_steps": steps}))
    assert [path.name for path in score_files(tmp_path / "ica")] == ["scores.parquet"]
    table = pq.read_table(tmp_path / "ica" / "scores.parquet")
    assert len(set(table["refresh"].to_pylist())) == callback_of(trainer).state.counts.refreshes > 2
    assert set(table["row"].to_pylist()) <= set(range(ROWS)) and write_report(tmp_path).is_file()


def test_nothing_that_is_written_holds_a_secret_or_a_path_of_this_machine(tmp_path):
    holdout = tmp_path / "holdout.jsonl"
    tokenised(6, 9).to_json(holdout)
    trainer = build(tmp_path / "out", None, save_strategy="steps", save_steps=1, max_steps=2)
    entry = {"path": "json", "data_files": str(holdout), "token": "hf_s3cr3t"}
    attach(trainer, {**tiny.NAMED, "retrieval": "random", "k": 2}, holdout=entry)
    trainer.train()
    ours = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and "ica" in str(path.relative_to(tmp_path))]
    assert {path.name for path in ours} >= {"run.json", "scores.parquet", "ica_state.safetensors"}
    for path in ours:
        assert b"hf_s3cr3t" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes(), path
