"""The mean log-prob."""

from __future__ import annotations

import numpy as np
import pytest

from scored import (
    make_context,
    mean_logprob,
    score,
    sign,
)


@pytest.mark.parametrize("kind", ["sft", "pair", "unpaired"])
def test_likelihood(kind):
    context = make_context("likelihood", kind)
    expected = [sign(row) * mean_logprob(context.engine.model, row) for row in context.train]
    np.testing.assert_allclose(score(context), expected, atol=1e-4)
