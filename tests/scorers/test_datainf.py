"""DataInf."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from scored import (
    gradient,
    make_context,
    make_lora,
    score,
    sign,
)


@pytest.mark.parametrize("kind", ["sft", "pair", "unpaired"])
def test_datainf_is_the_mean_of_inverses(kind):
    context = make_context("datainf", kind)
    model = context.engine.model
    rows = [gradient(model, row) for row in context.train]
    shown = [gradient(model, row) for row in context.shown]
    expected = np.zeros(len(rows))
    for layer in range(len(rows[0])):
        g = np.stack([row[layer].ravel() for row in rows])
        v = np.mean([row[layer].ravel() for row in shown], axis=0)
        damping = 0.1 * (g**2).sum(axis=1).mean() / g.shape[1]
        inverse = np.mean([np.linalg.inv(damping * np.eye(g.shape[1]) + np.outer(x, x)) for x in g], axis=0)
        expected += g @ inverse @ v
    expected *= [sign(row) for row in context.train]
    np.testing.assert_allclose(score(context), expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())


def test_datainf_before_the_first_step(monkeypatch):
    """LoRA's A has no gradient then; and a sample of rows serves the Hessian where all are too many."""
    monkeypatch.setattr(sys.modules["ica_plugin.scorers.datainf"], "HESSIAN_ROWS", 3)
    values = score(make_context("datainf", model=make_lora(trained=False)))
    assert np.isfinite(values).all() and values.std() > 0
