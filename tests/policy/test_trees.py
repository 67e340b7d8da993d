"""Sequences that begin alike, as trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ica_plugin.policy import packed
from ica_plugin.policy.trees import common_prefix, grow, split_into_trees


def test_pairs_share_their_prompt():
    rng = np.random.default_rng(0)
    prompt, chosen, rejected = (rng.integers(3, 512, size=n) for n in (20, 6, 9))
    tree = grow(sorted([np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])], key=lambda r: r.tolist()))
    assert len(tree.tokens) == 20 + 6 + 9


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=30),
    st.integers(1, 60),
    st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_trees_hold_every_sequence_once_within_limits(raw, max_tokens, max_predictions):
    sequences = [np.array(row) for row in raw]
    needed = np.array([len(row) // 2 for row in raw])
    trees = split_into_trees(sequences, needed, cost=lambda m: 16 + m, max_tokens=max_tokens, max_predictions=max_predictions)
    assert sorted(i for tree in trees for i in tree) == list(range(len(raw)))
    for index in trees:
        tree = grow([sequences[i] for i in index])
        assert len(index) == 1 or (len(tree.tokens) <= max_tokens and needed[index].sum() <= max_predictions)
        prefixes = {tuple(sequences[i][:n]) for i in index for n in range(1, len(sequences[i]) + 1)}
        assert len(tree.tokens) == len(prefixes)
        mask = packed._mask(torch.from_numpy(tree.ends)).numpy()
        for i, path in zip(index, tree.paths, strict=True):
            assert (tree.tokens[path] == sequences[i]).all() and (tree.positions[path] == np.arange(len(path))).all()
            for at, node in enumerate(path):
                assert set(np.flatnonzero(mask[node])) == set(path[: at + 1])


def test_division_is_the_cheapest():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 3, size=rng.integers(2, 8)) for _ in range(9)]
    cost = lambda m: 3 + m + m**2 / 20  # noqa: E731
    trees = split_into_trees(sequences, np.zeros(9, int), cost=cost, max_tokens=1000, max_predictions=1)
    found = sum(cost(len(grow([sequences[i] for i in t]).tokens)) for t in trees)
    order = [i for tree in trees for i in tree]
    cheapest = np.inf
    for cuts in range(2**8):
        stops = [i + 1 for i in range(8) if cuts >> i & 1] + [9]
        parts = [order[a:b] for a, b in zip([0, *stops], stops)]
        cheapest = min(cheapest, sum(cost(len(grow([sequences[i] for i in p]).tokens)) for p in parts))
    assert found == pytest.approx(cheapest)


def test_common_prefix():
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2
    assert common_prefix(np.array([1, 2]), np.array([1, 2, 4])) == 2
    assert common_prefix(np.array([1]), np.array([2])) == 0
