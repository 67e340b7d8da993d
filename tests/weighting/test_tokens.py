"""Which tokens are left out, and by what the others are multiplied."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ica_plugin.data.store import Sequence
from ica_plugin.weighting.tokens import ends, kept, scale, threshold


def test_the_end_of_a_turn_and_special_tokens_never_go():
    row = Sequence(np.array([5, 6, 7, 2, 9, 5, 8, 6, 4]), np.array([0, 1, 1, 1, 0, 0, 1, 1, 1], bool))
    assert ends(row, {2}).tolist() == [False, False, True, False, False, True]
    assert ends(row, set()).tolist() == [False, False, True, False, False, True]
    assert ends(row, {6}).tolist() == [True, False, True, False, True, True]


def test_a_row_never_loses_all_and_one_without_a_demonstration_loses_none():
    nothing = np.zeros(3, bool)
    assert kept(np.array([-9.0, -1, -8]), -5, nothing).tolist() == [False, True, False]
    assert kept(np.array([-9.0, -7, -8]), -5, nothing).all()
    assert kept(np.array([-9.0, -7, -8]), -5, np.array([False, False, True])).tolist() == [False, False, True]
    assert kept(np.zeros(0), -5, nothing).all() and len(kept(np.zeros(0), -5, nothing)) == 3
    assert kept(np.array([np.nan, -1, -8]), -5, nothing).tolist() == [True, True, False]


def test_the_threshold_is_a_quantile_of_what_is_finite():
    values = np.array([-4.0, -3, -2, -1, 0, np.nan, -np.inf])
    assert threshold(values, 0.25) == -3 and threshold(np.array([np.nan]), 0.1) == -np.inf


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=30))
def test_the_mean_over_all_tokens_stays(rows):
    weights, tokens = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    left = np.array([round(row[1] * row[2]) for row in rows])
    factor = scale(weights, tokens, left)
    if (weights * left).sum() > 1e-9:
        assert (weights * left * factor).sum() == pytest.approx((weights * tokens).sum())
    else:
        assert factor >= 1
