"""A scoring that is killed goes on where it was: SIGKILL at several moments, and what must not be taken for its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from checks import callback_of, read_scores
from ica_plugin.errors import ICAError
from ica_plugin.run import scoring
from ica_plugin.run.files import ScoreFile
from runs import ROWS, build, run, tokenised

# Scores as `ica-plugin score` does, in a process for each of MOMENTS that kills itself when the block of that number is about to
# be written, or just has been. Forked, so that imports are paid for once.
SCORE = """
import json, os, signal, sys
from pathlib import Path
from ica_plugin.run import parts, scoring
from runs import build
from test_parts import score

out = Path(sys.argv[1])
scoring.TOKENS_PER_BLOCK = 120
add, written = parts.Parts.add, 0

def counted(self, kind, columns):
    global written
    if (written, "before") == (kill_at, moment):
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, kind, columns)
    print("block", json.dumps([kind, list(map(int, columns["row"]))]), flush=True)
    if written == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    written += 1

parts.Parts.add = counted
for kill_at, moment in json.loads(sys.argv[2]):
    child = os.fork()
    if not child:
        score(build(out.parent / "run", {"retrieval": "policy"}), out)
        os._exit(0)
    print("end", os.waitpid(child, 0)[1], flush=True)
"""


def score(trainer, out: Path) -> None:
    """What `ica-plugin score` does with a host's trainer."""
    callback = callback_of(trainer)
    callback.refresh.files = ScoreFile(out)
    parts = callback.refresh.parts = callback.parts_in(out.with_name(f"{out.name}.unfinished"))
    callback.refresh(list(range(len(callback.train))), shared=True)
    parts.remove()


def scorings(out: Path, moments: list[tuple[int, str]]) -> tuple[list[int], list]:
    """Run SCORE; how each process ended, and the blocks that all of them finished."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCORE, str(out), json.dumps(moments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return [int(rest) for word, rest in lines if word == "end"], [json.loads(rest) for word, rest in lines if word == "block"]


@pytest.mark.slow
def test_a_killed_scoring_goes_on_and_its_file_is_that_of_an_uninterrupted_one(tmp_path):
    whole, out = tmp_path / "whole.parquet", tmp_path / "scores.parquet"
    _, blocks = scorings(whole, [(-1, "")])
    assert len(blocks) > 6 and sorted(row for kind, rows in blocks if kind == "scores" for row in rows) == list(range(ROWS))
    # Before anything is there, after the demonstrations, before and after scores of different blocks: each goes on from the one before.
    ends, finished = scorings(
        out, [(0, "before"), (0, "after"), (0, "before"), (1, "after"), (1, "before"), (0, "after"), (-1, "")]
    )
    assert ends == [signal.SIGKILL] * 6 + [0]
    assert finished == blocks, "every block once, and the same blocks"
    assert pq.read_table(out).equals(pq.read_table(whole))
    assert not out.with_name("scores.parquet.unfinished").exists()


def interrupted(folder: Path, monkeypatch, ica: dict, after: int = 3, **settings) -> None:
    """A run that stops with an error after some blocks."""
    trainer = build(folder, ica, **settings)
    parts, count = callback_of(trainer).refresh.parts, 0
    add = parts.add

    def stopping(*block):
        nonlocal count
        add(*block)
        count += 1
        if count == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def scored_rows(monkeypatch) -> list[int]:
    """Rows that are scored from here on."""
    rows: list[int] = []
    scores_for_sets = scoring.scores_for_sets
    monkeypatch.setattr(scoring, "scores_for_sets", lambda context: rows.extend(context.rows) or scores_for_sets(context))
    return rows


def test_the_scoring_before_the_first_step_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS_PER_BLOCK", 200)
    run(tmp_path / "whole", {})
    interrupted(tmp_path / "run", monkeypatch, {})
    rows = scored_rows(monkeypatch)
    # Keys that act on scores alone may change in between.
    run(tmp_path / "run", {"keep": 0.5, "max_weight": 5.0})
    assert 0 < len(rows) < ROWS and len(set(rows)) == len(rows)
    tables = [read_scores(tmp_path / name / "ica" / "scores.parquet").drop(["draws"]) for name in ("whole", "run")]
    assert tables[0].equals(tables[1])
    assert not (tmp_path / "run" / "ica" / "unfinished").exists(), "they have served when training ends"


@pytest.mark.parametrize("change", ["k", "score_tokens", "rows", "weights"])
def test_blocks_of_another_scoring_are_noticed(tmp_path, monkeypatch, change):
    monkeypatch.setattr(scoring, "TOKENS_PER_BLOCK", 200)
    interrupted(tmp_path, monkeypatch, {})
    other, name = {
        "k": (dict(ica={"k": 1}), "ica.k"),
        "score_tokens": (dict(ica={"score_tokens": 2}), "ica.score_tokens"),
        "rows": (dict(ica={}, train=tokenised(ROWS, 1)), "train rows"),
        "weights": (dict(ica={}, model=tiny.make_model(seed=1)), "the model's weights"),
    }[change]
    with pytest.raises(ICAError, match=f"unfinished holds finished blocks of another scoring.*{name}"):
        build(tmp_path, **other).train()
    rows = scored_rows(monkeypatch)
    other["ica"]["on_resume_mismatch"] = "rescore"
    build(tmp_path, **other).train()
    assert sorted(rows) == list(range(ROWS))


def test_a_scorer_with_gradients_sees_another_adapter(tmp_path, monkeypatch):
    def policy(seed: int):
        torch.manual_seed(seed)
        return get_peft_model(tiny.make_model(), LoraConfig(r=2, target_modules=["q_proj"]))

    monkeypatch.setattr(scoring, "TOKENS_PER_BLOCK", 100)
    # A fresh LoRA is another one at every start and changes nothing: log-probs are the same, gradients are not.
    interrupted(tmp_path / "ica", monkeypatch, {"score": "ica"}, model=policy(0))
    run(tmp_path / "ica", {"score": "ica"}, model=policy(1))
    interrupted(tmp_path / "influence", monkeypatch, {"score": "influence"}, after=2, model=policy(0))
    with pytest.raises(ICAError, match="the model"):
        run(tmp_path / "influence", {"score": "influence"}, model=policy(1))


@pytest.mark.parametrize("score", ["ica + likelihood", "one_shot", "rds", "random"])
def test_scores_do_not_depend_on_blocks(tmp_path, monkeypatch, score):
    columns = []
    for tokens in (1 << 18, 150):
        monkeypatch.setattr(scoring, "TOKENS_PER_BLOCK", tokens)
        callback = callback_of(build(tmp_path, {"score": score}))
        rows = list(range(ROWS))
        columns.append(callback.scoring.score(rows, callback.scoring.find_demonstrations(rows)))
    for name, values in columns[0].items():
        np.testing.assert_allclose(values, columns[1][name], rtol=1e-4, atol=1e-5)
