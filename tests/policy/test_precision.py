"""Scoring leaves training untouched."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engines import CPU, rows
from ica_plugin.policy import packed
from ica_plugin.policy.engine import Engine
from tiny import make_model


def test_scoring_leaves_training_untouched():
    model = make_model().train()
    model.lm_head.eval()
    ids = torch.randint(3, 512, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    engine = Engine(model, device=CPU)
    engine.logprobs(rows(4))
    engine.embeddings([s.unscored for s in rows(4)])
    assert model.training and model.model.training and not model.lm_head.training
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    assert packed._BRANCHES is None


def test_dropout_is_off_while_scoring():
    model = make_model(attention_dropout=0.5).train()
    engine = Engine(model, device=CPU)
    assert np.array_equal(engine.logprobs(rows(4)), engine.logprobs(rows(4)))


@pytest.mark.parametrize("name", ["npu", "mps"])
def test_random_states_of_other_devices_are_put_back(name, monkeypatch):
    """`torch.manual_seed`, as the holdout adapter calls it, seeds every device."""
    state = ["as the run left it"]

    def restore(value):
        state[0] = value

    if name == "mps":  # one device, without `_all`
        fake = SimpleNamespace(is_available=lambda: True, get_rng_state=lambda: state[0], set_rng_state=restore)
    else:
        fake = SimpleNamespace(
            is_initialized=lambda: True,
            get_rng_state=None,
            get_rng_state_all=lambda: state[0],
            set_rng_state_all=restore,
        )
    engine = Engine(make_model().train(), device=CPU)
    monkeypatch.setattr(torch, name, fake, raising=False)
    with engine.undisturbed():
        with engine.undisturbed(gradient=True):
            assert torch.is_grad_enabled() and not engine.model.training
            state[0] = "seeded"
        assert not torch.is_grad_enabled() and state[0] == "seeded"
    assert state[0] == "as the run left it" and engine.model.training
