"""Sums, bands and several holdout sets."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import rankdata

from ica_plugin.config import parse_config
from ica_plugin.expression import parse_score
from ica_plugin.scorers import scores_for, total_score, weight_shares
from ica_plugin.scorers.combine import balanced, combined, in_band
from ica_plugin.weighting.weights import weights_from_scores
from scored import (
    make_context,
)


def test_a_sum_shares_the_base_pass():
    context = make_context("ica + 0.5*likelihood")
    seen = []
    logprobs = context.engine.logprobs
    context.engine.logprobs = lambda sequences, *rest: seen.append(len(sequences)) or logprobs(sequences, *rest)
    columns = scores_for(context)
    assert seen == [16]  # eight rows, with and without their demonstrations
    ranks = rankdata(columns["ica"]) / 8 + 0.5 * rankdata(columns["likelihood"]) / 8
    np.testing.assert_allclose(total_score(context.config, columns), ranks)
    z = parse_config({"holdout": "x", "score": "ica + 0.5*likelihood", "combine": "zscore"})
    expected = sum(f * (columns[n] - columns[n].mean()) / columns[n].std() for f, n in ((1, "ica"), (0.5, "likelihood")))
    np.testing.assert_allclose(total_score(z, columns), expected)
    single = make_context("likelihood")
    np.testing.assert_allclose(scores_for(single)["base"], columns["base"], atol=1e-4)


def test_a_sum_without_all_its_parts_is_nan():
    found = combined(
        parse_score("ica+rds"), {"ica": np.array([1, np.nan, 3.0]), "rds": np.array([2.0, 1, 1])}, combine="rank", band=(0, 1)
    )
    np.testing.assert_array_equal(found, [1.5, np.nan, 1.5])


def test_the_other_side_of_a_scorer():
    parts = {"ica": np.array([1, np.nan, 3.0, 2.0]), "rds": np.array([2.0, 1, 1, 5])}
    np.testing.assert_array_equal(combined(parse_score("-2*ica"), parts, combine="rank", band=(0, 1)), [-1, np.nan, -3, -2])
    found = combined(parse_score("ica - 0.5*rds"), parts, combine="rank", band=(0, 1))
    np.testing.assert_allclose(found, np.array([1 - 0.5 * 2, np.nan, 3 - 0.5 * 1, 2 - 0.5 * 3]) / 3)


def test_band_scorers_keep_the_intersection():
    rng = np.random.default_rng(0)
    ica, irm = rng.normal(size=(2, 40))
    ica[7] = np.nan
    depth = in_band([ica, irm], (0.25, 0.75))
    finite = np.isfinite(ica)
    inside = [(rankdata(x[finite]) - 0.5) / 39 for x in (ica, irm)]
    expected = np.all([(q >= 0.25) & (q <= 0.75) for q in inside], axis=0)
    np.testing.assert_array_equal(depth[finite] >= 0, expected)
    assert np.isnan(depth[7]) and 5 < expected.sum() < 30
    config = parse_config({"holdout": "x", "score": "ica-irm", "weighting": "band"})
    weights = weights_from_scores(depth, config, tokens=np.full(40, 3), by_token=False)
    np.testing.assert_array_equal(weights.values[finite] > 0, expected)


def test_an_untrained_policy_leaves_the_band_to_the_other_scorer():
    depth = in_band([np.arange(8.0), np.zeros(8)], (0.25, 0.75))
    np.testing.assert_array_equal(depth >= 0, [False, False, True, True, True, True, False, False])


def test_a_factor_leaves_the_band_as_it_is():
    depths, tokens = np.linspace(-0.25, 0.25, 9), np.ones(9, int)
    kept = [
        weights_from_scores(
            depths, parse_config({"holdout": "x", "score": name, "weighting": "band"}), tokens=tokens, by_token=False
        )
        for name in ("ica-irm", "0.5*ica-irm")
    ]
    assert [(weights.values > 0).tolist() for weights in kept] == [(depths >= 0).tolist()] * 2


@pytest.mark.parametrize("name", ["ica-irm", "lossdiff-irm"])
def test_band_scorers_of_a_policy(name):
    context = make_context(name, "pair", holdout_adapter={"steps": 2})
    columns = scores_for(context)
    np.testing.assert_array_equal(
        total_score(context.config, columns), in_band([columns[name.split("-")[0]], columns["irm"]], (0.25, 0.75))
    )


def test_balance():
    a, b = np.array([3.0, 2, 1, np.nan, 0]), np.array([0.0, 10, 20, np.nan, np.nan])
    z = [(x - x[np.isfinite(x)].mean()) / x[np.isfinite(x)].std() for x in (a, b)]
    mean = balanced([a, b], "mean", "zscore")
    np.testing.assert_allclose(mean[:3], (z[0] + z[1])[:3] / 2)
    assert np.isnan(mean[3]) and mean[4] == z[0][4]
    np.testing.assert_allclose(balanced([a, b], "max", "zscore")[:3], np.maximum(*z)[:3])
    # a takes row 0, b row 2, a row 1; row 4 is the last that anyone has
    turns = balanced([a, b], "round_robin", "rank")
    assert np.argsort(-turns[[0, 1, 2, 4]]).tolist() == [0, 2, 1, 3] and np.isnan(turns[3])


def test_the_weight_goes_to_the_set_that_a_row_is_best_for():
    sets = [{"name": name, "path": f"{name}.jsonl"} for name in ("maths", "code")]
    config = parse_config({"holdout": sets, "score": "ica"})
    columns = {
        "ica:maths": np.array([3.0, 2.0, 1.0, np.nan, np.nan]),
        "ica:code": np.array([-1.0, 0.0, 1.0, 5.0, np.nan]),
        "base": np.zeros(5),
    }
    # By rank within its set: maths 3/3, 2/3, 1/3, none, none; code 1/4, 2/4, 3/4, 4/4, none.
    shares = weight_shares(config, columns, np.array([1.0, 2.0, 3.0, 4.0, 100.0]))
    assert shares == {"maths": pytest.approx(0.3), "code": pytest.approx(0.7)}
    assert weight_shares(parse_config({"holdout": "x", "score": "ica"}), {"ica": np.ones(2)}, np.ones(2)) == {}
