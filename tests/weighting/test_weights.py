import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from ica_plugin.config import ICAConfig
from ica_plugin.errors import ICAError
from ica_plugin.weighting.weights import weights_from_scores

SCHEMES = ["softmax", "minmax", "rank", "top", "band"]
SCORES = np.array([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0])


def weigh(scores, *, tokens=None, by_token=False, **block):
    tokens = np.ones(len(scores), int) if tokens is None else np.asarray(tokens)
    further = {name: block.pop(name) for name in ("neutral", "rows") if name in block}
    return weights_from_scores(
        np.asarray(scores, float), ICAConfig(holdout="x", **{**tiny.NAMED, **block}), tokens=tokens, by_token=by_token, **further
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


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 1e4])
def test_max_weight_holds_at_an_extreme_temperature(temperature):
    """Softmax weights that underflow to 0 left one row with the weight of all."""
    scores = np.random.default_rng(0).normal(size=2000)
    weights = weigh(scores, temperature=temperature)
    assert weights.values.max() <= 10 and weights.values.mean() == pytest.approx(1)
    assert (np.diff(weights.values[np.argsort(scores)]) >= 0).all()


@given(
    scores=st.lists(st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1.0, 1e9])), min_size=1, max_size=60),
    tokens=st.lists(st.integers(1, 500), min_size=60, max_size=60),
    by_token=st.booleans(),
    temperature=st.floats(-4, 4).map(lambda exponent: 10.0**exponent),
    limit=st.floats(-3, 3).map(lambda exponent: 1 + 10.0**exponent),
    broken=st.integers(0, 2),
)
@settings(deadline=None, max_examples=300)
def test_max_weight_and_the_mean_hold_at_any_temperature(scores, tokens, by_token, temperature, limit, broken):
    broken = min(broken, len(scores) - 1)
    tokens = np.array(tokens[: len(scores)])
    weights = weigh(
        [*scores[broken:], *[np.nan] * broken], tokens=tokens, by_token=by_token, temperature=temperature, max_weight=limit
    )
    share = tokens if by_token else np.ones(len(scores))
    assert (weights.values <= limit).all() and (weights.values[weights.clipped] == limit).all()
    # Where even the limit on every good row is too little for a mean of 1, the limit holds.
    reachable = min(1.0, limit * share[~weights.bad].sum() / share.sum())
    assert (weights.values * share).sum() / share.sum() == pytest.approx(reachable, rel=1e-6)
    assert (np.diff(weights.values[: len(scores) - broken][np.argsort(scores[broken:])]) >= -1e-9 * limit).all()


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


@pytest.mark.parametrize("n", [2, 16, 39])
def test_one_broken_row_does_not_stop_a_small_window(n):
    weights = weigh(np.append(np.linspace(0, 1, n - 1), np.nan))
    assert weights.values[-1] == 0 and weights.bad.sum() == 1 and weights.values.mean() == pytest.approx(1)


@pytest.mark.parametrize(("good", "broken"), [(0, 1), (0, 2), (1, 3), (13, 3)])
def test_broken_scores_on_the_whole_stop_a_small_window(good, broken):
    with pytest.raises(ICAError, match=f"{broken} of {good + broken} scores are NaN"):
        weigh(np.append(np.zeros(good), [np.nan] * broken))


def test_the_message_names_rows_and_not_their_places_in_the_window():
    with pytest.raises(ICAError, match=r"\(rows 905, 906, 907\)"):
        weigh([1.0, 2.0, np.nan, np.nan, np.nan], rows=np.array([3, 77, 905, 906, 907]))
    with pytest.raises(ICAError, match=r"\(rows 10, 11, 12, 13, 14 …\)"):
        weigh([np.nan] * 9, rows=np.arange(10, 19))


def test_rows_without_tokens_are_outside_and_rows_without_demonstrations_are_neutral():
    weights = weigh([np.nan, 1.0, 2.0, np.nan], tokens=[0, 5, 5, 5], by_token=True, neutral=np.array([False, False, False, True]))
    assert weights.values[0] == 0 and weights.values[3] == 1
    assert weights.values[1:3].mean() == pytest.approx(1) and not weights.bad.any()


def test_the_effective_sample_size():
    assert weigh(np.zeros(7)).effective_sample_size == pytest.approx(1)
    assert weigh(SCORES, weighting="top", keep=1 / 6).effective_sample_size == pytest.approx(1 / 6)
