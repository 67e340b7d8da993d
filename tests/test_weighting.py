import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ica_plugin.config import ICAConfig
from ica_plugin.errors import ICAError
from ica_plugin.weighting.weights import weights_from_scores

SCHEMES = ["softmax", "minmax", "rank", "top", "band"]
SCORES = np.array([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0])


def weigh(scores, *, tokens=None, by_token=False, neutral=None, **block):
    tokens = np.ones(len(scores), int) if tokens is None else np.asarray(tokens)
    return weights_from_scores(
        np.asarray(scores, float), ICAConfig(holdout="x", **block), tokens=tokens, by_token=by_token, neutral=neutral
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_softmax_formula(temperature):
    z = (SCORES - SCORES.mean()) / SCORES.std()
    expected = np.exp(z / temperature)
    assert np.allclose(weigh(SCORES, temperature=temperature).values, expected / expected.mean())


def test_minmax_is_the_papers_formula_without_winsorizing():
    expected = (SCORES - SCORES.min()) / (SCORES.max() - SCORES.min())
    assert np.allclose(weigh(SCORES, weighting="minmax", winsorize=0.0).values, expected / expected.mean())


def test_minmax_winsorizes_outliers():
    scores = np.append(np.linspace(0, 1, 200), 1e6)
    assert weigh(scores, weighting="minmax").values[:200].max() > 0.5
    assert weigh(scores, weighting="minmax", winsorize=0.0).values[:200].max() < 0.5


def test_rank_top_and_band():
    assert np.allclose(weigh([5, 1, 9], weighting="rank").values, np.array([2, 1, 3]) / 2)
    assert weigh(SCORES, weighting="top", keep=0.5).values.tolist() == [0, 0, 0, 2, 2, 2]
    assert weigh(SCORES, weighting="band", band=[0.2, 0.8]).values.tolist() == [0, 1.5, 1.5, 1.5, 1.5, 0]


def test_rows_that_tie_at_the_cut_of_top_share_what_is_left():
    """Equal scores have equal weights: the rows' order decides nothing."""
    assert weigh([7, 7, 7, 7], weighting="top", keep=0.5).values.tolist() == [1, 1, 1, 1]
    assert np.allclose(weigh([1, 7, 7, 9, 0, 7], weighting="top", keep=0.5).values, 2 * np.array([0, 2 / 3, 2 / 3, 1, 0, 2 / 3]))


@given(
    scores=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
    tokens=st.lists(st.integers(1, 500), min_size=40, max_size=40),
    scheme=st.sampled_from(SCHEMES),
    by_token=st.booleans(),
    temperature=st.floats(0.01, 100),
)
@settings(deadline=None, max_examples=200)
def test_mean_one_nonnegative_and_monotone(scores, tokens, scheme, by_token, temperature):
    tokens = np.array(tokens[: len(scores)])
    weights = weigh(scores, tokens=tokens, by_token=by_token, weighting=scheme, temperature=temperature, keep=0.3, band=[0, 1])
    share = tokens if by_token else np.ones(len(scores))
    assert (weights.values * share).sum() / share.sum() == pytest.approx(1, rel=1e-9)
    assert (weights.values >= 0).all()
    if scheme != "band":
        order = np.argsort(np.array(scores), kind="stable")
        rising = np.diff(weights.values[order])
        assert (rising >= -1e-9).all() or scheme == "top"


@given(st.lists(st.floats(-50, 50), min_size=20, max_size=60), st.floats(1.5, 12))
@settings(deadline=None)
def test_no_softmax_weight_is_above_max_weight(scores, limit):
    weights = weigh(scores, max_weight=limit, temperature=0.3)
    assert weights.values.max() <= limit * (1 + 1e-9)
    assert weights.values.mean() == pytest.approx(1)
    assert (weights.values[weights.clipped] == limit).all()


def test_clipping_gives_what_it_takes_to_the_other_rows():
    weights = weigh(np.append(np.zeros(99), 100.0), max_weight=10.0)
    assert weights.values[-1] == 10 and weights.clipped.sum() == 1
    assert np.allclose(weights.values[:-1], 90 / 99)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_scores_give_equal_weights(scheme):
    weights = weigh(np.full(10, 0.1), weighting=scheme).values
    assert np.allclose(weights, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_row(scheme):
    assert weigh([3.0], weighting=scheme).values.tolist() == [1.0]


def test_nan_and_infinite_scores_get_weight_zero_and_are_counted():
    scores = np.append(np.linspace(0, 1, 98), [np.nan, np.inf])
    weights = weigh(scores)
    assert weights.values[-2:].tolist() == [0, 0] and weights.bad.sum() == 2
    assert weights.values.mean() == pytest.approx(1)


def test_more_than_five_percent_broken_scores_stop_the_run():
    with pytest.raises(ICAError, match="6 of 100 scores are NaN or infinite.*policy itself is broken"):
        weigh(np.append(np.linspace(0, 1, 94), [np.nan] * 6))


def test_rows_without_tokens_are_outside_and_rows_without_demonstrations_are_neutral():
    weights = weigh([np.nan, 1.0, 2.0, np.nan], tokens=[0, 5, 5, 5], by_token=True, neutral=np.array([False, False, False, True]))
    assert weights.values[0] == 0 and weights.values[3] == 1
    assert weights.values[1:3].mean() == pytest.approx(1) and not weights.bad.any()


def test_the_effective_sample_size():
    assert weigh(np.zeros(7)).effective_sample_size == pytest.approx(1)
    assert weigh(SCORES, weighting="top", keep=1 / 6).effective_sample_size == pytest.approx(1 / 6)
