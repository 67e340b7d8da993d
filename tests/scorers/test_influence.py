"""Influence by gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from ica_plugin.errors import ICAError
from ica_plugin.scorers.influence import truncated
from scored import (
    gradient,
    make_context,
    make_examples,
    make_lora,
    row_loss,
    score,
    sign,
)


@pytest.mark.parametrize("kind, length_normalize", [("sft", False), ("pair", False), ("pair", True), ("unpaired", False)])
def test_influence(kind, length_normalize):
    context = make_context("influence", kind, length_normalize=length_normalize)
    model = context.engine.model
    shown = [gradient(model, row, length_normalize) for row in context.shown]
    target = [np.mean([g[i] for g in shown], axis=0) for i in range(len(shown[0]))]
    expected = [
        sign(row) * sum((g * t).sum() for g, t in zip(gradient(model, row, length_normalize), target, strict=True))
        for row in context.train
    ]
    np.testing.assert_allclose(score(context), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_influence_is_what_a_step_does():
    context = make_context("influence")
    values, model = score(context), context.engine.model
    with torch.no_grad():
        before = np.mean([float(row_loss(model, row)) for row in context.shown])
    for i in range(4):
        step = [1e-4 * torch.from_numpy(g).float() for g in gradient(model, context.train[i])]
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            [p.sub_(s) for p, s in zip(parameters, step, strict=True)]
            after = np.mean([float(row_loss(model, row)) for row in context.shown])
            [p.add_(s) for p, s in zip(parameters, step, strict=True)]
        assert (before - after) / 1e-4 == pytest.approx(values[i], rel=0.05, abs=0.02 * np.abs(values).max())


@pytest.mark.parametrize("steps", [0, 2])
def test_influence_by_adam(steps):
    """The direction is what torch's own Adam would step, from its own moments."""
    model = make_lora()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for seed in range(steps):
        for p, g in zip(parameters, gradient(model, make_examples("sft", 1, 50 + seed)[0]), strict=True):
            p.grad = torch.from_numpy(g).float()
        optimizer.step()
    context = make_context("influence", model=model, influence={"adam": True})
    context.optimizer = optimizer
    shown = [gradient(model, row) for row in context.shown]
    target = [np.mean([g[i] for g in shown], axis=0) for i in range(len(shown[0]))]
    saved = copy.deepcopy(optimizer.state_dict())
    start = [p.detach().clone() for p in parameters]
    expected = []
    for row in context.train[:4]:
        copied = torch.optim.Adam(parameters, lr=1.0)
        copied.load_state_dict({**copy.deepcopy(saved), "param_groups": copied.state_dict()["param_groups"]})
        for p, g in zip(parameters, gradient(model, row), strict=True):
            p.grad = torch.from_numpy(g).float()
        copied.step()
        expected.append(
            sum(float(((s - p).detach().double().numpy() * t).sum()) for p, s, t in zip(parameters, start, target, strict=True))
        )
        with torch.no_grad():
            [p.copy_(s) for p, s in zip(parameters, start, strict=True)]
        model.zero_grad()
    np.testing.assert_allclose(score(context)[:4], expected, rtol=2e-2, atol=5e-3 * np.abs(expected).max())


def test_influence_by_adam_needs_moments():
    model = make_lora()
    context = make_context("influence", model=model, influence={"adam": True})
    context.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    context.optimizer.step()
    with pytest.raises(ICAError, match="adamw_torch"):
        score(context)


def test_truncated():
    scores = np.array([0.0, 1, 2, 3, np.nan, 4, 5, 6, 7, 8, 9])
    found = truncated(scores, (0.2, 0.8))
    np.testing.assert_array_equal(found, [2, 2, 2, 3, np.nan, 4, 5, 6, 7, 2, 2])
    np.testing.assert_array_equal(truncated(scores, None), scores)
    context = make_context("influence", influence={"truncate": [0.25, 0.75]})
    assert len(set(score(context))) < 8
