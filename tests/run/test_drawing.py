"""`apply: sample` in a plain transformers Trainer: who is trained how often, and that equal weights are the host's own run."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tiny
from checks import callback_of, parameters, write_weights
from ica_plugin.errors import ICAError
from processes import torchrun
from runs import ROWS, Recorder, build, run

SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "batch of 4": {"per_device_train_batch_size": 4},
    "drop_last": {"dataloader_drop_last": True, "per_device_train_batch_size": 4},
    "workers": {"dataloader_num_workers": 2},
    "persistent workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "sequential": {"train_sampling_strategy": "sequential"},
    "unseeded sampler": {"accelerator_config": {"use_seedable_sampler": False}},
    "max_steps": {"max_steps": 5},
    "max_steps over epochs": {"max_steps": 14},
    "fractional epochs": {"num_train_epochs": 1.5},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "neftune": {"neftune_noise_alpha": 5.0},
}
# Scored, and all weighted 1.
ONES = {"apply": "sample", "weighting": "top", "keep": 1.0, "retrieval": "policy"}
EQUAL = {
    "never": {},
    "epoch": {"refresh_interval": "epoch"},
    "windows": {"refresh_interval": 2, "candidates": 1},
    "all in windows": {"refresh_interval": 2, "refresh_scope": "all"},
}
WEIGHTS = np.random.default_rng(0).gamma(1.0, 1.0, ROWS)


def table(folder: Path) -> dict[str, list]:
    return pq.read_table(folder / "ica" / "scores.parquet").to_pydict()


def given(folder: Path, weights: np.ndarray = WEIGHTS, **more) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    return {"apply": "sample", "weights": str(write_weights(folder / "weights.parquet", weights)), **more}


def same(one: Recorder, other: Recorder) -> bool:
    a, b = parameters(one), parameters(other)
    return all(torch.equal(a[key], b[key]) for key in a)


def counted(trainer: Recorder, since: int = 0, until: int = 10**9) -> list[int]:
    found = Counter(row for step, rows, *_ in trainer.trained if since <= step < until for row in rows)
    return [found[row] for row in range(ROWS)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("interval", EQUAL)
def test_equal_weights_are_the_host_s_own_run(tmp_path, name, interval):
    """Dropout, so that the random numbers must be the host's own too."""
    runs = []
    for folder, block in (("plain", None), ("sample", {**ONES, **EQUAL[interval]})):
        trainer = build(tmp_path / folder, block, model=tiny.make_model(attention_dropout=0.3), **SETTINGS[name])
        torch.manual_seed(11)
        trainer.train()
        runs.append(trainer)
    plain, sample = runs
    assert [(step, end, tokens) for step, _, end, tokens in sample.trained] == [
        (step, end, tokens) for step, _, end, tokens in plain.trained
    ]
    assert same(plain, sample)
    if interval == "never":
        assert table(tmp_path / "sample")["draws"] == counted(sample)


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_are_trained_as_often_as_the_file_says(tmp_path, name):
    plain = run(tmp_path / "plain", None, **SETTINGS[name])
    trainer = run(tmp_path, given(tmp_path), **SETTINGS[name])
    assert table(tmp_path)["draws"] == counted(trainer)
    assert [(step, end, len(rows)) for step, _, end, rows in trainer.trained] == [
        (step, end, len(rows)) for step, _, end, rows in plain.trained
    ]
    record = json.loads((tmp_path / "ica" / "run.json").read_text())
    assert record["apply"] == "sample" and record["distinct_rows"] == len(set(np.flatnonzero(counted(trainer))))
    assert record["never_drawn"] == ROWS - record["distinct_rows"] > 0


def test_an_epoch_s_draws_are_its_weights_up_to_one(tmp_path):
    trainer = run(tmp_path, given(tmp_path), num_train_epochs=4)
    mean = WEIGHTS / WEIGHTS.mean()
    for epoch in range(4):
        draws = np.array(counted(trainer, 6 * epoch, 6 * epoch + 6))
        assert draws.sum() == ROWS and (np.abs(draws - mean) < 1).all()
    shares = [entry["ica/distinct_share"] for entry in trainer.state.log_history if "ica/distinct_share" in entry]
    assert len(shares) == 4 and all(0 < share < 1 for share in shares)


def test_a_row_that_is_drawn_keeps_its_place(tmp_path):
    plain = run(tmp_path / "plain", given(tmp_path, np.ones(ROWS)), num_train_epochs=1)
    trainer = run(tmp_path, given(tmp_path), num_train_epochs=1)
    order, trained = ([row for _, rows, *_ in one.trained for row in rows] for one in (plain, trainer))
    assert [trained[place] for place, row in enumerate(order) if row in trained] == [row for row in order if row in trained]
    assert order != trained


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("block", [{}, {"candidates": 3}, {"refresh_scope": "all"}, {"refresh_interval": "epoch"}], ids=str)
def test_refreshed_rows_are_trained_as_often_as_the_file_says(tmp_path, name, block):
    settings = {"learning_rate": 0.05, **SETTINGS[name]}
    plain = run(tmp_path / "plain", None, **settings)
    trainer = run(tmp_path, {"apply": "sample", "refresh_interval": 3, "weighting": "rank", **block}, **settings)
    assert [(step, end, len(rows)) for step, _, end, rows in trainer.trained] == [
        (step, end, len(rows)) for step, _, end, rows in plain.trained
    ]
    found = table(tmp_path)
    starts = sorted({(refresh, step) for refresh, step in zip(found["refresh"], found["step"], strict=True)})
    if "refresh_scope" not in block:  # else several refreshes are in use at a time only where a window's end is not an epoch's
        assert len(starts) == len({step for _, step in starts})
    for (refresh, step), (_, until) in zip(starts, [*starts[1:], (0, 10**9)], strict=True):
        draws = np.zeros(ROWS, int)
        for at, row, times in zip(found["refresh"], found["row"], found["draws"], strict=True):
            draws[row] += times * (at == refresh)
        assert draws.tolist() == counted(trainer, step, until), (refresh, step)
        weights = [w for at, w in zip(found["refresh"], found["weight"], strict=True) if at == refresh]
        assert np.mean(weights) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_every_row_is_a_candidate_once_before_any_is_again(tmp_path, candidates):
    run(tmp_path, {"apply": "sample", "refresh_interval": 1, "candidates": candidates}, num_train_epochs=1)
    found = table(tmp_path)
    seen: Counter = Counter()
    for refresh in range(max(found["refresh"]) + 1):
        rows = [row for at, row in zip(found["refresh"], found["row"], strict=True) if at == refresh]
        assert len(rows) == candidates * (4 if refresh < 5 else 2)
        seen.update(rows)
        assert max(seen.values()) - min(seen[row] for row in range(ROWS)) <= 1
    assert seen == {row: candidates for row in range(ROWS)}


def test_more_candidates_than_rows_are_all_rows(tmp_path):
    run(tmp_path, {"apply": "sample", "refresh_interval": 4, "candidates": 9}, num_train_epochs=1)
    assert Counter(table(tmp_path)["row"]) == {row: 2 for row in range(ROWS)}


@pytest.mark.parametrize("share, drop_last, updates, places", [(0.5, False, 3, 11), (0.5, True, 3, 10), (0.01, False, 1, 1)])
def test_epoch_share_shortens_the_run(tmp_path, share, drop_last, updates, places):
    settings = {"dataloader_drop_last": drop_last, "logging_strategy": "steps", "logging_steps": 1, "warmup_steps": 0.4}
    trainer = run(tmp_path, given(tmp_path, epoch_share=share), **settings)
    assert trainer.state.max_steps == trainer.state.global_step == 2 * updates
    assert sum(counted(trainer)) == 2 * places and table(tmp_path)["draws"] == counted(trainer)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    warm = -(-0.4 * 2 * updates // 1)
    assert np.argmax(rates) == warm and rates[-1] <= 0.01 / (2 * updates - warm) + 1e-9


def test_epoch_share_with_windows(tmp_path):
    block = {"apply": "sample", "refresh_interval": 2, "epoch_share": 0.5}
    trainer = run(tmp_path, block, num_train_epochs=2)
    assert trainer.state.global_step == 6 and sum(counted(trainer)) == 22
    assert Counter(table(tmp_path)["row"]) == {row: 2 for row in range(ROWS)}, "candidates: 2 of half the places, in two epochs"
    plain = run(tmp_path / "all", {**block, "refresh_scope": "all"}, num_train_epochs=2)
    assert plain.state.global_step == 6 and sum(counted(plain)) == 22


def test_a_budget_goes_with_windows(tmp_path):
    trainer = run(tmp_path, {"apply": "sample", "refresh_interval": 3, "budget": 0.5, "retrieval": "policy"})
    found = table(tmp_path)
    assert sum(found["draws"]) == sum(counted(trainer)) == 2 * ROWS


BLOCKS = {
    "given": None,
    "never": {},
    "epoch": {"refresh_interval": "epoch", "retrieval": "policy"},
    "windows": {"refresh_interval": 4, "retrieval": "policy"},
    "steps": {"refresh_interval": 1, "candidates": 3},
    "all": {"refresh_interval": 4, "refresh_scope": "all"},
    "share": {"refresh_interval": 2, "epoch_share": 0.7},
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1}, {"gradient_accumulation_steps": 3}],
    ids=str,
)
def test_resumed_from_any_checkpoint_it_ends_the_same(tmp_path, name, settings):
    """Where the host itself draws its order from the global random state (grouped by length), the checkpoint's places count in the
    epoch that it was written in; the next epoch's order is the host's own, of other random numbers than those of the whole run."""
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.02, **settings}
    if "train_sampling_strategy" in settings:
        settings["num_train_epochs"] = 1
    block = given(tmp_path) if name == "given" else {"apply": "sample", "weighting": "rank", **BLOCKS[name]}
    whole = run(tmp_path / "whole", block, **settings)
    for step in range(1, whole.state.max_steps):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(tmp_path / "whole" / "ica", folder / "ica")
        resumed = run(folder, block, resume=str(folder / f"checkpoint-{step}"), **settings)
        assert resumed.trained == [one for one in whole.trained if one[0] >= step], step
        assert same(resumed, whole), step
        assert table(folder) == table(tmp_path / "whole")
        records = [json.loads((path / "ica" / "run.json").read_text()) for path in (folder, tmp_path / "whole")]
        assert records[0]["distinct_rows"] == records[1]["distinct_rows"]


@pytest.mark.parametrize("name", ["never", "windows"])
def test_resumed_with_another_batch_size_or_without_skipping(tmp_path, name):
    block = {"apply": "sample", "weighting": "rank", **BLOCKS[name]}
    run(tmp_path, block, save_strategy="steps", save_steps=1)
    for settings in ({"per_device_train_batch_size": 4}, {"ignore_data_skip": True}):
        resumed = run(tmp_path / "on", block, resume=str(tmp_path / "checkpoint-2"), **settings)
        assert resumed.state.global_step == resumed.state.max_steps and resumed.trained[0][0] == 2


def test_a_checkpoint_without_state_is_scored_and_drawn_again(tmp_path):
    block = {"apply": "sample", "weighting": "rank", **BLOCKS["windows"]}
    run(tmp_path, block, save_strategy="steps", save_steps=1)
    (tmp_path / "checkpoint-2" / "ica_state.safetensors").unlink()
    resumed = run(tmp_path / "on", block, resume=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 12
    assert sum(table(tmp_path / "on")["draws"]) == sum(counted(resumed)) == 2 * ROWS - 8


def test_auto_find_batch_size(tmp_path):
    trainer = build(tmp_path, given(tmp_path), auto_find_batch_size=True, per_device_train_batch_size=4)
    host_step = trainer.training_step

    def too_large(model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return host_step(model, inputs, *args, **kwargs)

    trainer.training_step = too_large
    trainer.train()
    assert table(tmp_path)["draws"] == counted(trainer) and sum(counted(trainer)) == 2 * ROWS


def test_a_second_train_draws_again(tmp_path):
    trainer = build(tmp_path, given(tmp_path), num_train_epochs=1)
    trainer.train()
    first = counted(trainer)
    trainer.trained = []
    trainer.train()
    assert counted(trainer) == first == table(tmp_path)["draws"]


def test_a_fused_loss_of_a_trained_output_embedding_is_drawn_for(tmp_path):
    """Nothing is hooked into the model."""
    trainer = build(tmp_path, given(tmp_path))
    trainer.train()
    assert not trainer.model.lm_head._forward_hooks and not trainer.model.model._forward_hooks


def test_a_batch_that_was_not_drawn_stops(tmp_path):
    trainer = build(tmp_path, given(tmp_path, np.eye(ROWS)[0]))
    host_loader = trainer.get_train_dataloader

    def without_places():
        loader = host_loader()
        loader.base_dataloader.__dict__["batch_sampler"] = loader.ica_places.host
        return loader

    trainer.get_train_dataloader = without_places
    with pytest.raises(ICAError, match="rows that were not drawn"):
        trainer.train()


def test_wrong_blocks_say_what_to_do(tmp_path):
    with pytest.raises(ICAError, match="`epoch_share` below 1 goes with `apply: sample`"):
        build(tmp_path, {**given(tmp_path), "apply": "gradient", "epoch_share": 0.5})
    with pytest.raises(ICAError, match="`dispatch_batches: true`.* or set `apply: gradient`"):
        build(tmp_path, given(tmp_path), accelerator_config={"dispatch_batches": True})
    trainer = build(tmp_path, {**given(tmp_path), "apply": "auto"}, accelerator_config={"dispatch_batches": True})
    assert callback_of(trainer).drawing is None


RANKS = {
    "plain": {},
    "22 of 24": {"per_device_train_batch_size": 3},  # accelerate repeats rows of the epoch's beginning
    "drop_last": {"dataloader_drop_last": True, "per_device_train_batch_size": 3},
    "max_steps": {"max_steps": 8, "dataloader_num_workers": 1},
    "split": {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 4},
    "grouped": {"train_sampling_strategy": "group_by_length"},
}
RANK_BLOCKS = {
    "host": None,
    "ones": {**ONES},
    "ones in windows": {**ONES, **EQUAL["windows"]},
    "given": {"apply": "sample", "weights": "weights.parquet"},
    "windows": {"apply": "sample", "refresh_interval": 2, "weighting": "rank"},
    "all": {"apply": "sample", "refresh_interval": 2, "refresh_scope": "all", "weighting": "rank"},
    "share": {"apply": "sample", "weights": "weights.parquet", "epoch_share": 0.5},
}


@pytest.mark.slow
def test_two_ranks_train_what_the_file_says(tmp_path):
    write_weights(tmp_path / "weights.parquet", WEIGHTS)
    done = torchrun(__file__, 2, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in RANKS:
        runs = {
            block: [json.loads((tmp_path / f"{name} {block} {rank}.json").read_text()) for rank in range(2)]
            for block in RANK_BLOCKS
        }
        for block in ("ones", "ones in windows"):
            assert runs[block] == [{**one, "rows": here["rows"]} for one, here in zip(runs["host"], runs[block], strict=True)], (
                name
            )
        for block in ("ones", "given", "windows", "all", "share"):
            found = table(tmp_path / f"{name} {block}")
            trained = Counter(row for rank in runs[block] for row in rank["rows"])
            draws: Counter = Counter()
            for row, times in zip(found["row"], found["draws"], strict=True):
                draws[row] += times
            assert {row: n for row, n in draws.items() if n} == trained, (name, block)
            assert runs[block][0]["end"] == runs[block][1]["end"]


def main(folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    for name, settings in RANKS.items():
        for key, block in RANK_BLOCKS.items():
            block = block and {k: str(folder / v) if k == "weights" else v for k, v in block.items()}
            trainer = run(folder / f"{name} {key}", block, **settings)
            record = {
                "rows": [row for _, rows, *_ in trainer.trained for row in rows],
                "trained": [(step, end, tokens) for step, _, end, tokens in trainer.trained],
                "end": {key: float(value.double().sum()) for key, value in parameters(trainer).items()},
            }
            (folder / f"{name} {key} {trainer.accelerator.process_index}.json").write_text(json.dumps(record))
            if block:
                assert callback_of(trainer).drawing is not None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
