"""`drop_tokens`: what is left out, by a plain reference; that it reaches the gradient; resume; ranks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_resume import SAVING, same
from transformers import DataCollatorWithFlattening

import tiny
from checks import callback_of, check_token_gradients, parameters
from ica_plugin import attach
from ica_plugin.config import parse_config
from ica_plugin.errors import ICAError
from ica_plugin.run import tokens
from ica_plugin.run.token_weights import TokenWeights
from processes import torchrun
from runs import ROWS, Recorder, build, run, tokenised

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "gradient_accumulation_steps": 1}
BLOCK = {"drop_tokens": 0.2, "weighting": "rank", "k": 2}


@torch.no_grad()
def token_logprobs(model, context: list[int], tokens: list[int], scored: np.ndarray) -> np.ndarray:
    """The definition: one row, one forward."""
    logprobs = model(input_ids=torch.tensor([[*context, *tokens]])).logits[0].double().log_softmax(-1)
    at = np.flatnonzero(scored) + len(context)
    return np.array([float(logprobs[t - 1, [*context, *tokens][t]]) for t in at])


def written(folder: Path) -> dict[int, dict]:
    return {line["row"]: line for line in pq.read_table(folder / "ica" / "scores.parquet").to_pylist()}


@pytest.mark.parametrize("drop", [0.2, "auto"])
@pytest.mark.parametrize(("score", "most"), [("ica", None), ("likelihood", None), ("ica", 4)])
def test_what_is_left_out_is_what_a_plain_reference_leaves_out(tmp_path, drop, score, most):
    model, holdout = tiny.make_model(), tokenised(6, 9)
    block = {**BLOCK, "drop_tokens": drop, "score": score, "score_tokens": most}
    trainer = build(tmp_path, block, model=model, holdout=holdout, max_steps=1)
    callback = callback_of(trainer)
    rows = [callback.train[row].sequences[0] for row in range(ROWS)]
    demos = callback.scoring.find_demonstrations(list(range(ROWS)))
    shown = [[token for demo in of_row for token in holdout[demo]["input_ids"]] for of_row in demos]
    # With `score_tokens` the first tokens alone are known, so that no other can be left out.
    values = [
        token_logprobs(model, context, row.tokens.tolist(), row.scored)[:most] for context, row in zip(shown, rows, strict=True)
    ]
    if drop == "auto":
        calibrated = []
        for i, row in enumerate(holdout):
            others = holdout.select([j for j in range(6) if j != i])
            # `retrieval: random` draws by the row's own tokens among all holdout rows, so that those left keep their order.
            alone = attach_to_others(tmp_path / str(i), holdout, others, i)
            calibrated.append(token_logprobs(model, alone, row["input_ids"], np.array(row["labels"]) != -100)[:most])
        limit = np.quantile(np.concatenate(calibrated), 0.01)
    else:
        limit = np.quantile(np.concatenate(values), drop)
    trainer.train()
    lines = written(tmp_path)
    if drop == "auto":
        assert callback.state.tokens.limit == pytest.approx(limit, abs=1e-4)
    total = 0
    for row, line in lines.items():
        scored = np.flatnonzero(rows[row].scored)
        close = np.abs(values[row] - limit) < 1e-4
        expected = {int(t) for t, value in zip(scored[:most], values[row], strict=True) if value < limit and t != scored[-1]}
        unsure = {int(t) for t in scored[:most][close]}
        assert set(line["dropped_tokens"]) - unsure == expected - unsure
        total += len(line["dropped_tokens"])
    assert total > 0
    record = json.loads((tmp_path / "ica" / "run.json").read_text())
    assert record["tokens_left_out"] == pytest.approx(total / sum(row.scored.sum() for row in rows), abs=1e-6)


def attach_to_others(folder: Path, holdout, others, own: int) -> list[int]:
    """The tokens shown to holdout row `own`, found as a train row of a run whose holdout is the same rows."""
    trainer = build(folder, {"k": 2, "score": "ica"}, train=holdout.select([own]), holdout=holdout, max_steps=1)
    (shown,) = callback_of(trainer).scoring.find_demonstrations([0])
    assert own not in shown and len(others) == 5
    return [token for demo in shown for token in holdout[demo]["input_ids"]]


@pytest.mark.parametrize("apply", ["gradient", "sample"])
def test_a_run_is_the_explicit_weighted_sum(tmp_path, apply):
    """Plain SGD written out, batch by batch, from the rows that the trainer trained and what scores.parquet says of them."""
    trainer = build(tmp_path, {**BLOCK, "apply": apply}, **SGD)
    start = parameters(trainer)
    trainer.train()
    lines, rows = written(tmp_path), callback_of(trainer).train
    weight = {row: line["weight"] for row, line in lines.items()}
    counts = np.array([lines[row]["tokens"] for row in range(ROWS)])
    left = counts - [len(lines[row]["dropped_tokens"]) for row in range(ROWS)]
    of_row = np.array([weight[row] for row in range(ROWS)])
    factor = (of_row * counts).sum() / (of_row * left).sum()
    assert factor > 1.05
    model = tiny.make_model()
    model.load_state_dict(start, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _, batch, _, _ in trainer.trained:
        total, count = torch.zeros(()), 0
        for row in batch:
            sequence = rows[row].sequences[0]
            logprobs = model(input_ids=torch.from_numpy(sequence.tokens)[None]).logits[0].log_softmax(-1)
            for t in np.flatnonzero(sequence.scored):
                count += 1
                if t not in lines[row]["dropped_tokens"]:
                    total = total - logprobs[t - 1, sequence.tokens[t]] * factor * (weight[row] if apply == "gradient" else 1)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(parameters(trainer)[name], value.detach(), rtol=1e-4, atol=2e-6)


def make_trainer(tmp_path, flattened=False):
    def make(*, ica, micro_batch=2, accumulation=1, **settings):
        trainer = build(tmp_path, None, per_device_train_batch_size=micro_batch, **settings)
        if ica is not None:
            if flattened:
                trainer.data_collator = DataCollatorWithFlattening()
            attach(trainer, {"retrieval": "random", **tiny.NAMED, **ica}, holdout=tokenised(6, 9))
        return trainer

    return make


@pytest.mark.parametrize("flattened", [False, True], ids=["padded", "flattened"])
def test_gradient_of_a_batch(tmp_path, flattened):
    check_token_gradients(make_trainer(tmp_path, flattened))


def test_without_the_key_nothing_is_looked_at(tmp_path):
    trainer = build(tmp_path, {"weighting": "rank"})
    assert (
        trainer.callback_handler and callback_of(trainer).state.tokens is None and callback_of(trainer).refresh.dropping is None
    )


@pytest.mark.parametrize(
    "block", [{"refresh_interval": 4}, {"refresh_interval": "epoch", "apply": "sample"}], ids=["window", "epoch"]
)
def test_resumed_from_any_checkpoint_it_ends_the_same(tmp_path, block):
    block = {**BLOCK, "drop_tokens": "auto", **block}
    whole = run(tmp_path / "whole", block, **SAVING)
    for step in (1, 4, 6, 9):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(tmp_path / "whole" / "ica", folder / "ica")
        resumed = run(folder, block, resume=str(folder / f"checkpoint-{step}"))
        assert same(parameters(resumed), parameters(whole)), step
        one, other = callback_of(resumed).state.tokens, callback_of(whole).state.tokens
        assert all(np.array_equal(one.kept_of(row), other.kept_of(row)) for row in range(ROWS)) and one.limit == other.limit
        assert (
            pq.read_table(folder / "ica" / "scores.parquet").to_pylist()
            == pq.read_table(tmp_path / "whole" / "ica" / "scores.parquet").to_pylist()
        )


def test_the_threshold_is_not_found_anew_for_every_small_window(tmp_path, monkeypatch):
    found = []
    trainer = build(tmp_path, {**BLOCK, "drop_tokens": "auto", "refresh_interval": 1}, num_train_epochs=6)
    host = tokens.holdout_tokens
    monkeypatch.setattr(tokens, "holdout_tokens", lambda scoring, rows: found.append(rows) or host(scoring, rows))
    trainer.train()
    # 36 windows of 4 rows, and every 10 times 6 rows scored the threshold is found anew.
    assert len(found) == 3 and all(rows == list(range(6)) for rows in found)


def test_refused_where_it_means_nothing():
    for block, said in (
        ({"weights": "w.csv"}, "with `weights` that is not so"),
        ({"holdout": "h.jsonl", "budget": 0.1}, "with `budget` that is not so"),
        ({"holdout": "h.jsonl", "drop_tokens": 1.5}, "allowed: auto, or a share"),
        ({"holdout": "h.jsonl", "drop_tokens": True}, "allowed: auto, or a share"),
    ):
        with pytest.raises(ICAError, match=said):
            parse_config({"drop_tokens": "auto"} | block)


def test_a_holdout_of_one_row_cannot_say_how_surprising_a_good_token_is(tmp_path):
    trainer = build(tmp_path, {**BLOCK, "drop_tokens": "auto"}, holdout=tokenised(1, 9))
    with pytest.raises(ICAError, match="at least two different holdout rows"):
        trainer.train()


def test_several_sets_drop_what_is_surprising_after_each(tmp_path):
    for name, seed in (("a", 9), ("b", 10)):
        tokenised(5, seed).save_to_disk(str(tmp_path / name))
    sets = [{"name": name, "path": str(tmp_path / name)} for name in ("a", "b")]
    trainer = build(tmp_path, None, max_steps=1)
    attach(trainer, {**tiny.NAMED, **BLOCK, "holdout": sets, "retrieval": "random", "k": 1})
    callback = callback_of(trainer)
    model, rows = trainer.model, [callback.train[row].sequences[0] for row in range(ROWS)]
    best = []
    for row, shown in zip(rows, callback.scoring.find_demonstrations(list(range(ROWS))), strict=True):
        assert len(shown) == 2
        contexts = [callback.holdout.examples[demo].demonstration.tokens.tolist() for demo in shown]
        best.append(np.max([token_logprobs(model, context, row.tokens.tolist(), row.scored) for context in contexts], axis=0))
    limit = np.quantile(np.concatenate(best), 0.2)
    trainer.train()
    lines = written(tmp_path)
    for row, values in enumerate(best):
        scored = np.flatnonzero(rows[row].scored)
        expected = [int(t) for t, value in zip(scored, values, strict=True) if value < limit and t != scored[-1]]
        assert lines[row]["dropped_tokens"] == expected
    assert sum(len(line["dropped_tokens"]) for line in lines.values()) > 0


def test_tokens_of_a_line_are_found_however_it_is_padded(capfd):
    train = callback_of(build(Path("/nowhere"), {}, max_steps=1)).train
    weights = TokenWeights(train)
    row = train[3].sequences[0]
    count = int(row.scored.sum())
    weights.give(np.array([3]), [np.arange(count) % 2 == 0], 2.0)
    expected = np.ones(len(row.tokens))
    expected[row.scored] = 2.0 * (np.arange(count) % 2 == 0)
    ids, n = torch.from_numpy(row.tokens)[None], len(row.tokens)
    padding = torch.zeros((1, 5), dtype=torch.long)
    for left in (False, True):
        padded = torch.cat([padding, ids] if left else [ids, padding], dim=1)
        mask = torch.cat([padding, torch.ones_like(ids)] if left else [torch.ones_like(ids), padding], dim=1)
        for inputs in ({"input_ids": padded, "attention_mask": mask}, {"input_ids": padded}):
            found = weights.of_batch(torch.tensor([3]), inputs)[0].numpy()
            np.testing.assert_array_equal(found[5:] if left else found[:n], expected)
    cut = weights.of_batch(torch.tensor([3]), {"input_ids": ids[:, :-2], "attention_mask": torch.ones_like(ids[:, :-2])})
    np.testing.assert_array_equal(cut[0].numpy(), expected[:-2])
    cut = weights.of_batch(torch.tensor([3]), {"input_ids": ids[:, 2:], "attention_mask": torch.ones_like(ids[:, 2:])})
    np.testing.assert_array_equal(cut[0].numpy(), expected[2:])
    for _ in range(2):
        other = weights.of_batch(torch.tensor([3]), {"input_ids": ids + 1, "attention_mask": torch.ones_like(ids)})
        assert (other == 1).all()
    assert capfd.readouterr().err.count("it is trained whole") == 1


def test_a_row_that_was_drawn_twice_may_stand_in_a_packed_line_twice():
    train = callback_of(build(Path("/nowhere"), {}, max_steps=1)).train
    weights = TokenWeights(train)
    for row in (3, 5):
        weights.give(np.array([row]), [np.arange(train.supervised[row]) % 2 == 0], float(row))
    alone = {
        row: weights.of_batch(torch.tensor([row]), {"input_ids": torch.from_numpy(train[row].sequences[0].tokens)[None]})[
            0
        ].tolist()
        for row in (3, 5)
    }
    order = (3, 5, 3)
    line = np.concatenate([train[row].sequences[0].tokens for row in order])
    ids = np.repeat(order, [len(train[row].sequences[0].tokens) for row in order])
    packed = weights.of_batch(
        torch.from_numpy(np.append(ids, [-1, -1]))[None], {"input_ids": torch.from_numpy(np.append(line, [0, 0]))[None]}
    )
    assert packed[0].tolist() == [*alone[3], *alone[5], *alone[3], 1, 1]


@pytest.mark.slow
def test_two_ranks_leave_out_what_one_does(tmp_path):
    done = torchrun(__file__, 2, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "one", {**BLOCK, "drop_tokens": "auto"}, max_steps=2, **SGD)
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    assert {row: line["dropped_tokens"] for row, line in one.items()} == {
        row: line["dropped_tokens"] for row, line in two.items()
    }


if __name__ == "__main__":
    trained = run(Path(sys.argv[1]), {**BLOCK, "drop_tokens": "auto"}, max_steps=2, **SGD)
    assert isinstance(trained, Recorder)
