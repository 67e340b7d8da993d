"""What goes wrong during a run: it goes on with the right weights, or stops and says what to do."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainerCallback

from checks import callback_of, parameters
from ica_plugin import attach
from ica_plugin.errors import ICAError
from ica_plugin.policy.memory import Budget
from ica_plugin.policy.packed import PackedPath
from runs import build, run, tokenised

WINDOW = {"refresh_interval": 4}


def scores(folder) -> list[dict]:
    return pq.read_table(folder / "ica" / "scores.parquet").to_pylist()


def test_out_of_memory_while_scoring_halves_the_forward_and_goes_on(tmp_path, monkeypatch, capfd):
    whole = run(tmp_path / "whole", WINDOW)
    host, calls = PackedPath.token_logprobs, []

    def short_of_memory(path, sequences):
        calls.append(len(sequences))
        if len(calls) in (3, 4, 9):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return host(path, sequences)

    monkeypatch.setattr(PackedPath, "token_logprobs", short_of_memory)
    trainer = build(tmp_path / "short", WINDOW)
    callback_of(trainer).scoring.engine.budget = Budget(tokens=256, predictions=256)
    trainer.train()
    assert len(calls) > 9 and "out of memory while scoring; at most" in capfd.readouterr().err
    for one, other in zip(scores(tmp_path / "whole"), scores(tmp_path / "short"), strict=True):
        assert one["row"] == other["row"] and one["score"] == pytest.approx(other["score"], abs=1e-4)
    assert trainer.state.global_step == whole.state.global_step


def test_out_of_memory_for_a_single_row_says_what_to_do(tmp_path, monkeypatch):
    def out_of_memory(path, sequences):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = build(tmp_path, WINDOW)
    assert callback_of(trainer).scoring.engine.path  # it tries the model itself
    monkeypatch.setattr(PackedPath, "token_logprobs", out_of_memory)
    with pytest.raises(ICAError, match="out of memory while scoring a single row .* Lower `ica.k`"):
        trainer.train()


@pytest.mark.parametrize("fault", ["full disk", "read-only folder"])
def test_scores_that_cannot_be_written_do_not_end_the_run(tmp_path, monkeypatch, capfd, fault):
    whole = parameters(run(tmp_path / "whole", WINDOW))
    host, writes = pq.write_table, []

    def fails_once(table, path, *args, **kwargs):
        writes.append(path)
        if len(writes) == 1:
            if fault == "full disk":
                path.write_bytes(b"PAR1 half")  # what a full disk leaves behind
                raise OSError(28, "No space left on device")
            raise PermissionError(13, "Permission denied", str(path))
        host(table, path, *args, **kwargs)

    monkeypatch.setattr("ica_plugin.run.files.pq.write_table", fails_once)
    trainer = run(tmp_path / "fault", WINDOW)
    said = capfd.readouterr().err
    assert "scores.parquet could not be written" in said and "Training goes on with the right weights" in said
    end = parameters(trainer)
    assert all(torch.equal(end[key], whole[key]) for key in whole)
    assert scores(tmp_path / "fault") == scores(tmp_path / "whole"), "the next refresh writes all of it"
    assert not [path for path in (tmp_path / "fault" / "ica").iterdir() if path.name.startswith(".scores")]


def test_an_output_folder_that_cannot_be_made(tmp_path, capfd):
    (tmp_path / "ica").write_text("a file where the folder should be")
    trainer = run(tmp_path, WINDOW)
    assert trainer.state.global_step == 12 and "scores.parquet could not be written" in capfd.readouterr().err


def test_a_holdout_file_that_changes_during_the_run_changes_nothing_until_it_is_resumed(tmp_path):
    def start(folder, change: bool):
        path = folder / "holdout.jsonl"
        folder.mkdir()
        tokenised(6, 9).to_json(path)

        class Change(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if change and state.global_step == 2:
                    tokenised(6, 8).to_json(path)

        trainer = build(folder, None, save_strategy="steps", save_steps=3)
        attach(trainer, {"retrieval": "random", "k": 2, "holdout": str(path), **WINDOW})
        trainer.add_callback(Change())
        return trainer

    whole, changed = start(tmp_path / "whole", False), start(tmp_path / "changed", True)
    whole.train()
    changed.train()
    assert scores(tmp_path / "changed") == scores(tmp_path / "whole")
    again = build(tmp_path / "changed", None)
    attach(again, {"retrieval": "random", "k": 2, "holdout": str(tmp_path / "changed" / "holdout.jsonl"), **WINDOW})
    with pytest.raises(ICAError, match="was written by another run; what differs: the holdout"):
        again.train(resume_from_checkpoint=str(tmp_path / "changed" / "checkpoint-3"))


def test_without_a_tokenizer_what_compares_texts_is_refused_when_attached_and_bm25_needs_none(tmp_path):
    trainer = build(tmp_path, None, max_steps=1)
    trainer.processing_class = None
    with pytest.raises(ICAError, match="compares texts, and the trainer has no tokenizer"):
        attach(trainer, {"retrieval": "some/model"}, holdout=tokenised(6, 9))
    attach(trainer, {"retrieval": "bm25"}, holdout=tokenised(6, 9))
    trainer.train()
    assert len({tuple(line["demos"]) for line in scores(tmp_path)}) > 1


@pytest.mark.parametrize("quiet", [True, False])
def test_the_scoring_bar_is_as_quiet_as_the_host_s(tmp_path, capfd, quiet):
    run(tmp_path, {}, max_steps=1, disable_tqdm=quiet)
    assert ("ICA scoring" in capfd.readouterr().err) != quiet
