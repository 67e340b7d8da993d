"""A policy that is NaN on some rows, or on all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from checks import callback_of
from engines import engine_with, rows
from ica_plugin.data.store import Sequence
from ica_plugin.errors import ICAError
from ica_plugin.policy.memory import Budget
from ica_plugin.policy.packed import PackedPath
from ica_plugin.policy.padded import PaddedPath
from runs import ROWS, build, run, tokenised


def with_nan_token(rows: list[int]):
    """Train rows of which some hold token 511, whose embedding is NaN: the policy overflows on these rows alone."""
    train = tokenised(ROWS, 0).to_list()
    for row in rows:
        train[row]["input_ids"][-1] = train[row]["labels"][-1] = 511
    model = tiny.make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[511] = torch.nan
    return train, model


@pytest.mark.parametrize("path", ["segments", "dense", "padded"])
def test_a_row_on_which_the_policy_is_nan_has_weight_0_and_no_other_row_notices(tmp_path, path, capfd):
    from datasets import Dataset

    train, model = with_nan_token([7])
    trainer = build(tmp_path, {}, train=Dataset.from_list(train), model=model, max_steps=1)
    callback = callback_of(trainer)
    engine = callback.scoring.engine
    base = engine._base
    engine._chosen = PaddedPath(model, base, engine.device) if path == "padded" else PackedPath(model, base, engine.device, path)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    callback.refresh(list(range(ROWS)), shared=True)
    assert "1 row(s) have a NaN or infinite score and weight 0: [7]" in capfd.readouterr().err
    assert callback.weights[7] == 0 and torch.isfinite(callback.weights).all()
    assert np.isfinite(np.delete(callback.state.scores.numpy(), 7)).all()


def test_a_policy_that_is_nan_on_many_rows_stops_the_run(tmp_path):
    from datasets import Dataset

    train, model = with_nan_token([2, 7, 9])
    with pytest.raises(ICAError, match=r"3 of 22 scores are NaN or infinite .* the policy itself is broken"):
        run(tmp_path, {}, train=Dataset.from_list(train), model=model)


@pytest.mark.parametrize("path", ["segments", "padded"])
def test_a_policy_that_is_nan_on_every_row_costs_a_few_forwards_and_stops(path):
    model = tiny.make_model().eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    engine, calls = engine_with(model, path, budget=Budget(400, 400)), []
    host = engine.path.token_logprobs
    engine.path.token_logprobs = lambda sequences: calls.append(len(sequences)) or host(sequences)
    sequences = rows(60)
    with pytest.raises(ICAError, match="NaN or infinite.*the policy itself is broken.*Check the loss of the plain run"):
        engine.logprobs(sequences)
    assert len(calls) <= 9 < len(sequences)


def test_a_batch_of_bad_rows_alone_stops_nothing():
    model = tiny.make_model().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[511] = torch.nan
    sequences = rows(20)
    bad = [Sequence(np.array([5, 6, 511, 7]), np.array([False, True, True, True]))] * 2
    found = engine_with(model, "padded", budget=Budget(8, 8)).logprobs([*sequences, *bad])
    clean = [not (s.tokens == 511).any() for s in [*sequences, *bad]]
    np.testing.assert_array_equal(np.isfinite(found), clean)
