"""The implicit reward margin."""

from __future__ import annotations

import numpy as np
import torch

from engines import listening
from scored import (
    BETA,
    logprob,
    make_context,
    make_lora,
    reference_margin,
    score,
)


def test_irm():
    context = make_context("irm", "pair")
    model = context.engine.model
    expected = []
    for row in context.train:
        with torch.no_grad():
            policy = float(logprob(model, row.sequences[0]) - logprob(model, row.sequences[1]))
        expected.append(BETA * (policy - reference_margin(model, row)))
    np.testing.assert_allclose(score(context), expected, atol=1e-4)
    assert np.std(expected) > 0.01
    assert model.active_adapter == "default" and all(p.requires_grad == ("lora" in n) for n, p in model.named_parameters())


def test_irm_of_an_untrained_adapter_says_so(caplog):
    with listening(caplog):
        assert (score(make_context("irm", "pair", make_lora(trained=False))) == 0).all()
    assert "refresh_interval" in caplog.text
