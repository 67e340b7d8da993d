"""A run that was stopped, at any moment, and resumed ends as the run that never was."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from checks import callback_of, parameters, write_weights
from ica_plugin.errors import ICAError
from ica_plugin.run.checkpoint import STATE_FILE
from ica_plugin.run.refresh import Refresh
from runs import ROWS, build, refreshes, run, tokenised

SAVING = {"save_strategy": "steps", "save_steps": 1}
BLOCKS = {
    "window": {"refresh_interval": 4, "retrieval": "policy"},
    "all": {"refresh_interval": 4, "refresh_scope": "all"},
    "epoch": {"refresh_interval": "epoch", "retrieval": "policy"},
    "never": {},
}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def scores(folder: Path) -> list[dict]:
    return pq.read_table(folder / "ica" / "scores.parquet").to_pylist()


@pytest.mark.parametrize("name", BLOCKS)
def test_resumed_from_any_checkpoint_it_ends_the_same(tmp_path, name):
    """12 updates; the checkpoints lie inside windows, at their ends, and at the end of the first epoch (6)."""
    whole = run(tmp_path / "whole", BLOCKS[name], **SAVING)
    end = parameters(whole)
    for step in (1, 3, 4, 5, 6, 9, 11):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(tmp_path / "whole" / "ica", folder / "ica")
        resumed = run(folder, BLOCKS[name], resume=str(folder / f"checkpoint-{step}"))
        assert same(parameters(resumed), end), step
        assert torch.equal(callback_of(resumed).weights, callback_of(whole).weights)
        assert torch.equal(callback_of(resumed).state.scores, callback_of(whole).state.scores)
        assert scores(folder) == scores(tmp_path / "whole")
        assert callback_of(resumed).state.counts.refreshes == callback_of(whole).state.counts.refreshes
        assert callback_of(resumed).state.counts.scored_rows == callback_of(whole).state.counts.scored_rows


def test_resumed_with_another_batch_size_inside_a_window_scores_the_rows_to_come(tmp_path, capfd):
    """The host goes on with other rows than those that were scored ahead."""
    run(tmp_path, BLOCKS["window"], **SAVING)
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = run(tmp_path / "on", BLOCKS["window"], resume=checkpoint, per_device_train_batch_size=4)
    assert "the rows to come are not those that were scored before the checkpoint" in capfd.readouterr().err
    assert callback_of(resumed).state.counts.refreshes >= 2 and not torch.isnan(callback_of(resumed).weights).any()


@pytest.mark.parametrize(
    "name, changes",
    [
        ("window", {"seed": 4}),
        ("window", {"num_train_epochs": 3}),
        ("fraction", {"num_train_epochs": 1}),
        ("fraction", {"num_train_epochs": 4}),
        ("window", {"data_seed": 5}),
        ("window", {"gradient_accumulation_steps": 1}),
        ("window", {"ignore_data_skip": True}),
        ("window", {"dataloader_drop_last": True, "per_device_train_batch_size": 3}),
    ],
    ids=str,
)
def test_whatever_moved_the_rows_to_come_they_are_trained_with_weights_of_their_window(tmp_path, name, changes):
    """Every row that is trained got its weight in the refresh that is the newest then."""
    block = {"refresh_interval": 0.5 if name == "fraction" else 4}
    run(tmp_path / "before", block, **SAVING)
    check_newest(build(tmp_path / "on", block, **changes), tmp_path / "before" / "checkpoint-2")


@pytest.mark.parametrize("apply", ["gradient", "sample"])
@pytest.mark.parametrize(
    "before, after, step", [(1, 2, 6), (2, 4, 20), (4, 2, 20), ({"max_steps": 16}, {"max_steps": 24}, 6)], ids=str
)
def test_a_fraction_of_another_number_of_steps(tmp_path, apply, before, after, step):
    """Resumed inside a window that is longer now, with 1 epoch as 2 the run stopped at rows that were never scored; with 2 as 4,
    steps 24 to 31 were trained with weights of the first epoch."""
    block = {"refresh_interval": 0.25, "apply": apply}
    settings = {"train": tokenised(32, 0), "gradient_accumulation_steps": 1}

    def epochs(given):
        return given if isinstance(given, dict) else {"num_train_epochs": given}

    run(tmp_path / "before", block, **settings, save_strategy="steps", save_steps=step, **epochs(before))
    resumed = build(tmp_path / "on", block, **settings, **epochs(after))
    check_newest(resumed, tmp_path / "before" / f"checkpoint-{step}")
    assert resumed.state.global_step == resumed.state.max_steps


def check_newest(resumed, checkpoint: Path) -> None:
    """Every row that is trained from the checkpoint on got its weight in the refresh that is the newest then."""
    callback, seen = callback_of(resumed), []
    look_up = callback.state.weights_of

    def recorded(rows):
        seen.append(callback.state.newest(rows[rows >= 0].tolist()))
        return look_up(rows)

    callback.state.weights_of = recorded
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert seen and all(seen)


def test_given_weights_go_on(tmp_path):
    block = {"weights": str(write_weights(tmp_path / "w.parquet", np.linspace(0, 2, ROWS)))}
    whole = run(tmp_path / "whole", block, **SAVING)
    resumed = run(tmp_path / "on", block, resume=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(parameters(resumed), parameters(whole))
    write_weights(tmp_path / "w.parquet", np.linspace(2, 0, ROWS))
    with pytest.raises(ICAError, match="what differs: the weights"):
        run(tmp_path / "other", block, resume=str(tmp_path / "whole" / "checkpoint-5"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    run(folder, BLOCKS["window"], max_steps=3, **SAVING)
    return folder / "checkpoint-3"


CHANGES = {
    "the train rows": {"train": tokenised(ROWS, 1)},
    "the holdout": {"holdout": tokenised(7, 9)},
    "the model": {"model": tiny.make_model(intermediate_size=48)},
    "ica.temperature (then 1.0, now 0.5)": {"temperature": 0.5},
    "ica.k (then 2, now 3), ica.seed (then 42, now 1)": {"k": 3, "seed": 1},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_run_s_checkpoint_is_refused(tmp_path, checkpoint, what, caplog):
    block = {**BLOCKS["window"], **{key: value for key, value in CHANGES[what].items() if key in ("temperature", "k", "seed")}}
    settings = {key: value for key, value in CHANGES[what].items() if key not in block}
    with pytest.raises(ICAError) as error:
        build_and_load(tmp_path, block, checkpoint, settings)
    assert f"what differs: {what}. Undo the change" in str(error.value) and "on_resume_mismatch: rescore" in str(error.value)
    assert not (tmp_path / "ica" / "scores.parquet").exists()
    if "model" in settings:  # the host itself cannot load it
        return
    resumed = run(tmp_path, {**block, "on_resume_mismatch": "rescore"}, resume=str(checkpoint), max_steps=5, **settings)
    assert refreshes(tmp_path)[0][0] == 3 and resumed.state.global_step == 5


def build_and_load(folder, block, checkpoint, settings):
    """As the host does before the first resumed step, without its own check of the model's shapes."""
    trainer = build(folder, block, **settings)
    trainer._load_optimizer_and_scheduler(str(checkpoint))


def test_a_checkpoint_without_state_is_scored_again_and_says_so(tmp_path, checkpoint, capfd):
    bare = shutil.copytree(checkpoint, tmp_path / "checkpoint-3", ignore=shutil.ignore_patterns(STATE_FILE))
    run(tmp_path, BLOCKS["window"], resume=str(bare))
    assert refreshes(tmp_path)[0][0] == 3
    assert "has no ICA state, so all rows are scored again" in capfd.readouterr().err


def test_a_damaged_state_is_not_read(tmp_path, checkpoint):
    broken = shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    whole = (broken / STATE_FILE).read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (broken / STATE_FILE).write_bytes(whole[:size])
        with pytest.raises(ICAError, match="is damaged .* Resume from an earlier checkpoint"):
            run(tmp_path, BLOCKS["window"], resume=str(broken))


def test_the_state_is_small_and_a_full_disk_does_not_end_the_run(tmp_path, checkpoint, monkeypatch, capfd):
    # float32 weight, float64 score and two int32 demonstrations per row, and a record.
    assert (checkpoint / STATE_FILE).stat().st_size < ROWS * (4 + 8 + 2 * 4) + 4096

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ica_plugin.run.checkpoint.save_file", full)
    trainer = run(tmp_path, BLOCKS["window"], **SAVING)
    assert trainer.state.global_step == 12 and not list(tmp_path.rglob(f"*{STATE_FILE}*"))
    assert "a run resumed from this checkpoint scores its rows again" in capfd.readouterr().err


# SIGKILL at random moments. Runs are forked from a server that has imported everything, so that each costs its steps alone.

PHASES = ("start", "scoring", "step", "checkpoint")
BLOCK = {"refresh_interval": 2, "retrieval": "policy"}


def child(folder: Path, resume: str | None, phase, counts) -> None:
    """A whole run in a process of its own, which says all the time what it is doing."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    trainer = build(folder, BLOCK, **SAVING)
    callback = callback_of(trainer)

    def during(name: str, work):
        def wrapped(*args, **kwargs):
            before, phase.value = phase.value, PHASES.index(name)
            counts[phase.value] += 1
            try:
                return work(*args, **kwargs)
            finally:
                phase.value = before

        return wrapped

    Refresh.__call__ = during("scoring", Refresh.__call__)
    trainer.training_step = during("step", trainer.training_step)
    trainer._save_checkpoint = during("checkpoint", trainer._save_checkpoint)
    trainer.train(resume_from_checkpoint=resume)
    result = {**parameters(trainer), "ica.weights": callback.weights, "ica.scores": callback.state.scores}
    save_file({name: value.contiguous() for name, value in result.items()}, folder / ".end")
    os.replace(folder / ".end", folder / "end.safetensors")
    os._exit(0)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The host writes trainer_state.json last, but not at once: one that cannot be parsed is not whole."""
    from transformers import TrainerState

    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        try:
            TrainerState.load_from_json(path / "trainer_state.json")
        except (OSError, ValueError):
            continue
        return str(path)
    return None


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_ends_the_same(tmp_path, monkeypatch):
    """27 runs: nine stopped while scoring, nine in or between steps, nine while a checkpoint is written; three of them by
    SIGTERM, the others by SIGKILL."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    )  # the server does not take over sys.path
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["checks", "runs", "test_resume"])
    rng = random.Random(0)

    def start(folder: Path, resume: str | None):
        folder.mkdir(exist_ok=True)
        phase, counts = context.Value("i", 0, lock=False), context.Array("i", len(PHASES), lock=False)
        process = context.Process(target=child, args=(folder, resume, phase, counts))
        process.start()
        return process, phase, counts

    def finish(folder: Path, resume: str | None) -> dict[str, torch.Tensor]:
        process, *_ = start(folder, resume)
        process.join(180)
        assert process.exitcode == 0
        return load_file(folder / "end.safetensors")

    expected = finish(tmp_path / "whole", None)
    table = scores(tmp_path / "whole")
    resumed_from, killed_in = [], []
    for attempt in range(27):
        folder = tmp_path / str(attempt)
        process, phase, counts = start(folder, None)
        target = 1 + attempt % 3
        occurrence = rng.randint(1, 5)
        deadline = time.monotonic() + 60
        while counts[target] < occurrence and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.02))
        killed_in.append(PHASES[phase.value])
        stop = signal.SIGTERM if attempt % 10 == 0 else signal.SIGKILL  # SIGTERM: attempts 0, 10 and 20
        os.kill(process.pid, stop)
        process.join()
        assert process.exitcode == -stop
        checkpoint = last_whole_checkpoint(folder)
        resumed_from.append(checkpoint and int(Path(checkpoint).name.split("-")[1]))
        assert checkpoint is None or (Path(checkpoint) / STATE_FILE).is_file()
        assert same(finish(folder, checkpoint), expected), (attempt, killed_in[-1], checkpoint)
        assert scores(folder) == table
    print(killed_in, resumed_from)
    assert {"scoring", "step", "checkpoint"} <= set(killed_in) and len(set(resumed_from)) >= 4
    assert not np.isnan(expected["ica.weights"].numpy()).any()
