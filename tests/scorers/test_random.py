"""The control."""

from __future__ import annotations

import numpy as np

from scored import (
    make_context,
    score,
)


def test_random_is_the_rows_own():
    context = make_context("random")
    values = score(context)
    assert len(set(values)) == 8 and (0 <= values).all() and (values < 1).all()
    context.rows = [5, 2]
    np.testing.assert_array_equal(score(context), values[[5, 2]])
    assert not np.array_equal(score(make_context("random", seed=1)), values)
