"""The one-shot gain."""

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
def test_one_shot(kind):
    context = make_context("one_shot", kind)
    model, holdout = context.engine.model, context.holdout.examples
    expected = [
        sign(row)
        * np.mean([mean_logprob(model, holdout[d], [row.demonstration]) - mean_logprob(model, holdout[d]) for d in demos])
        for row, demos in zip(context.train, context.demonstrations, strict=True)
    ]
    np.testing.assert_allclose(score(context), expected, atol=1e-4)


def test_one_shot_leaves_out_holdout_rows_that_do_not_fit():
    context = make_context("one_shot")
    context.demonstrations[0] = np.argsort([row.longest for row in context.holdout.examples])[[0, -1]].tolist()
    fits, _ = context.demonstrations[0]
    context.limit = len(context.train[0].demonstration.tokens) + context.holdout.examples[fits].longest
    model, holdout = context.engine.model, context.holdout.examples
    expected = mean_logprob(model, holdout[fits], [context.train[0].demonstration]) - mean_logprob(model, holdout[fits])
    assert score(context)[0] == pytest.approx(expected, abs=1e-4)
    again = make_context("one_shot")
    again.limit = 3
    assert np.isnan(score(again)).all()
