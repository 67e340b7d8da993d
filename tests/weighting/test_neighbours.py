"""What scored rows say about the others, at a cost that does not grow with the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from ica_plugin.config import ICAConfig
from ica_plugin.data.store import Example, Sequence
from ica_plugin.weighting import neighbours as module
from ica_plugin.weighting.neighbours import Neighbours, row_features
from ica_plugin.weighting.pool import NEWEST, SAMPLED, Pool


def block(**keys) -> ICAConfig:
    return ICAConfig(holdout="unused", budget=0.05, **{**tiny.NAMED, **keys})


def two_topics(n: int = 60):
    """Rows over two disjoint vocabularies; the first topic's scores are high."""
    rng = np.random.default_rng(0)
    rows, scores = [], []
    for i in range(n):
        topic = i % 2
        tokens = rng.integers(5 + 20 * topic, 25 + 20 * topic, size=16)
        rows.append(Example((Sequence(tokens, np.arange(16) >= 6),), "sft"))
        scores.append(5.0 * (1 - topic) + rng.normal(scale=0.3))
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(64, 32)
    return rows, np.array(scores), row_features(embedding, rows), np.full(n, 10)


@pytest.mark.parametrize("weighting", ["softmax", "rank", "top"])
def test_neighbours_suggest_the_weight_of_their_topic(weighting):
    rows, scores, features, tokens = two_topics()
    neighbours = Neighbours(features, tokens, block(weighting=weighting), by_token=True)
    scored = np.arange(24)
    neighbours.add(scored, scores[scored], np.zeros(24, bool))
    weights, correlation = neighbours.weigh(np.arange(60))
    assert weights.values.mean() == pytest.approx(1)
    others = weights.values[24:]
    assert others[::2].mean() > 1.4 * others[1::2].mean()
    assert correlation > 0.5


def test_without_any_score_all_weights_are_one():
    rows, scores, features, tokens = two_topics(8)
    tokens[3] = 0
    weights, correlation = Neighbours(features, tokens, block(), by_token=True).weigh(np.arange(8))
    assert weights.values.tolist() == [1, 1, 1, 0, 1, 1, 1, 1] and correlation is None


def test_scored_rows_keep_their_order_and_nan_is_weight_zero():
    rows, scores, features, tokens = two_topics()
    scores[0] = np.nan
    neighbours = Neighbours(features, tokens, block(), by_token=False)
    neighbours.add(np.arange(30), scores[:30], np.zeros(30, bool))
    weights, _ = neighbours.weigh(np.arange(60))
    assert weights.values[0] == 0 and weights.bad[0] and weights.bad.sum() == 1
    assert (np.argsort(weights.values[1:30]) == np.argsort(scores[1:30])).all()
    assert weights.values.mean() == pytest.approx(1)


# Cost.


@pytest.fixture
def count(monkeypatch):
    """Pairs of rows that were compared, and rows that were weighed against each other."""
    found = {"pairs": 0, "weighed": 0}
    distances, weights = module._distances, module.weights_from_scores

    def counted_distances(a, b):
        found["pairs"] += len(a) * len(b)
        return distances(a, b)

    def counted_weights(scores, *args, **kwargs):
        found["weighed"] += len(scores)
        return weights(scores, *args, **kwargs)

    monkeypatch.setattr(module, "_distances", counted_distances)
    monkeypatch.setattr(module, "weights_from_scores", counted_weights)
    # A tenth of what a run has, so that the test takes a second.
    monkeypatch.setattr("ica_plugin.weighting.pool.NEWEST", 200, raising=False)
    monkeypatch.setattr("ica_plugin.weighting.pool.SAMPLED", 200, raising=False)
    return found


WINDOW = 64


def plain_rows(n: int) -> tuple[Neighbours, np.ndarray]:
    rng = np.random.default_rng(0)
    return Neighbours(rng.normal(size=(n, 4)).astype(np.float32), np.full(n, 10), block(), by_token=True), rng.normal(size=n)


def test_the_cost_of_a_run_in_windows_grows_with_its_rows_alone(count):
    spent = {}
    for n in (2500, 5000, 10_000):
        count.update(pairs=0, weighed=0)
        neighbours, scores = plain_rows(n)
        for start in range(0, n, WINDOW):
            rows = np.arange(start, min(start + WINDOW, n))
            some = rows[::4]
            neighbours.add(some, scores[some], np.zeros(len(some), bool))
            neighbours.weigh(rows)
        spent[n] = dict(count)
    for few, many in ((2500, 5000), (5000, 10_000)):
        assert spent[many]["pairs"] < 2.5 * spent[few]["pairs"] and spent[many]["weighed"] < 2.5 * spent[few]["weighed"], spent
    assert spent[10_000]["pairs"] <= 10_000 * 400 * 2


def test_a_window_in_which_no_row_fits_asks_the_neighbours_and_nothing_more(count):
    neighbours, scores = plain_rows(4000)
    neighbours.add(np.arange(1000), scores[:1000], np.zeros(1000, bool))
    neighbours.weigh(np.arange(1000, 1064))
    count.update(pairs=0)
    _, correlation = neighbours.weigh(np.arange(2000, 2064))
    assert count["pairs"] <= 64 * 400 and correlation is not None


def test_all_rows_scored_at_once_are_weighed_against_each_other_and_not_against_a_part():
    neighbours, scores = plain_rows(6000)
    neighbours.add(np.arange(6000), scores, np.zeros(6000, bool))
    weights, _ = neighbours.weigh(np.arange(6000))
    assert weights.values.mean() == pytest.approx(1) and (np.diff(weights.values[np.argsort(scores)]) >= 0).all()


def test_the_pool_holds_the_newest_and_an_even_sample_of_those_before():
    pool, n = Pool(seed=0), 40_000
    for start in range(0, n, WINDOW):
        pool.add(np.arange(start, start + WINDOW))
    rows = pool.rows
    assert len(rows) == len(set(rows.tolist())) == NEWEST + SAMPLED
    assert set(range(n - NEWEST + WINDOW, n)) <= set(rows.tolist())
    old = rows[rows < n - NEWEST - WINDOW]
    quarters = np.bincount(old * 4 // n, minlength=4)[:3]
    assert (np.abs(quarters - quarters.mean()) < 5 * quarters.mean() ** 0.5).all()
    pool.add(rows)  # scored once more
    assert (pool.rows == rows).all()


def test_two_pools_of_one_seed_hold_the_same():
    first, second = Pool(seed=1), Pool(seed=1)
    for start in range(0, 12_000, 1000):
        for pool in (first, second):
            pool.add(np.arange(start, start + 1000))
    assert (first.rows == second.rows).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_the_limit_holds_for_suggested_weights(temperature):
    neighbours, scores = plain_rows(2000)
    neighbours.add(np.arange(500), scores[:500], np.zeros(500, bool))
    neighbours._config = block(temperature=temperature)
    for rows in (np.arange(2000), np.arange(490, 554)):
        weights, _ = neighbours.weigh(rows)
        assert weights.values.max() <= 10 and weights.values.mean() == pytest.approx(1)
