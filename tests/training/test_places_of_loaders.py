"""`Places` under many kinds of loaders, on one to three ranks."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from loaders import Rank, rows_of


class ByFours(BatchSampler):
    """A batch sampler of somebody's own, with batches of unequal sizes."""

    def __init__(self, n: int):
        self.n, self.batch_size, self.drop_last = n, 4, False

    def __len__(self) -> int:
        return 2 * (self.n // 6)

    def __iter__(self):
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(1)).tolist()
        for start in range(0, self.n - 5, 6):
            yield order[start : start + 2]
            yield order[start + 2 : start + 6]


def loader(n: int, size: int, drop_last: bool, shuffle: bool) -> DataLoader:
    rows = range(n)
    sampler = RandomSampler(rows) if shuffle else SequentialSampler(rows)
    return DataLoader(rows, batch_size=size, sampler=sampler, drop_last=drop_last, collate_fn=list)


LOADERS = [
    partial(loader, n, size, drop_last, shuffle)
    for n, size, drop_last, shuffle in [
        (22, 2, False, True),
        (23, 4, False, True),
        (23, 4, True, True),
        (23, 3, True, False),
        (7, 3, False, True),
        (5, 4, False, False),
    ]
]
RANKS = [
    {"num_processes": 1, "process_index": 0},
    {"num_processes": 2, "process_index": 0},
    {"num_processes": 3, "process_index": 0},
    {"num_processes": 2, "process_index": 0, "even_batches": False},
    {"num_processes": 2, "process_index": 0, "split_batches": True},
]
WINDOWS = [{}, {"window": 1}, {"window": 2}, {"window": 3, "rest": True}]


def all_ranks(make, weights, ranks: dict, **places) -> list[Rank]:
    return [Rank(make, weights, places, **{**ranks, "process_index": i}) for i in range(ranks["num_processes"])]


def skip_impossible(make, ranks):
    if ranks.get("split_batches") and make().batch_size % 2:
        pytest.skip("accelerate splits even batches alone")


@pytest.mark.parametrize("make", LOADERS, ids=lambda make: str(make.args))
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_any_loader(make, ranks, window):
    skip_impossible(make, ranks)
    if window and "even_batches" in ranks and len(make()) % 2:
        pytest.skip("one rank's epoch is shorter, which no trainer takes")
    n = len(make().dataset)
    host = [[Rank(make, None, **{**ranks, "process_index": i}).epoch(e) for e in range(2)] for i in range(ranks["num_processes"])]
    equal = all_ranks(make, np.full(n, 0.7), ranks, candidates=1)
    assert [[rank.epoch(epoch, **window) for epoch in range(2)] for rank in equal] == host
    weights = np.random.default_rng(n).gamma(1.0, 1.0, n)
    drawn = all_ranks(make, weights, ranks)
    found = [[rank.epoch(epoch, **window) for epoch in range(2)] for rank in drawn]
    assert [[[len(b) for b in epoch] for epoch in rank] for rank in found] == [[[len(b) for b in e] for e in r] for r in host]
    trained = Counter(rows_of(found))
    for rank in drawn:
        assert sum(rank.reported, Counter()) == trained
    assert trained != Counter(rows_of(host))


@pytest.mark.parametrize("ranks", RANKS[:2], ids=str)
def test_a_batch_sampler_of_somebody_s_own(ranks):
    def make():
        return DataLoader(range(24), batch_sampler=ByFours(24), collate_fn=list)

    ranks = {**ranks, "even_batches": False}
    weights = np.random.default_rng(0).gamma(1.0, 1.0, 24)
    host = [Rank(make, None, **{**ranks, "process_index": i}).epoch(0) for i in range(ranks["num_processes"])]
    assert [rank.epoch(0) for rank in all_ranks(make, np.ones(24), ranks)] == host
    found = [rank.epoch(0) for rank in all_ranks(make, weights, ranks)]
    assert [[len(batch) for batch in rank] for rank in found] == [[len(batch) for batch in rank] for rank in host]
    half = [rank.epoch(0) for rank in all_ranks(make, weights, ranks, share=0.5)]
    assert sum(len(rank) for rank in half) == 4


@pytest.mark.parametrize("make", LOADERS[:4], ids=lambda make: str(make.args))
@pytest.mark.parametrize("ranks", RANKS[:3], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.77])
def test_a_share_of_an_epoch(make, ranks, window, share):
    n, size = len(make().dataset), make().batch_size
    ranked = all_ranks(make, np.random.default_rng(n).gamma(1.0, 1.0, n), ranks, share=share)
    expected = [len(rank.loader) for rank in ranked]
    found = [rank.epoch(0, **window) for rank in ranked]
    assert [len(rank) for rank in found] == expected
    trained = Counter(rows_of(found))
    assert all(sum(rank.reported, Counter()) == trained for rank in ranked)
    unit = size * ranks["num_processes"]
    assert abs(sum(trained.values()) - share * n) <= unit


def test_the_run_s_end_within_an_epoch_is_counted():
    rank = Rank(LOADERS[0], np.random.default_rng(0).gamma(1.0, 1.0, 22))
    batches = rank.epoch(0, last=4)
    assert rank.reported == [Counter(rows_of(batches[:4]))]


def test_draws_differ_between_epochs_and_seeds():
    weights = np.random.default_rng(0).gamma(1.0, 1.0, 22)
    rank = Rank(LOADERS[0], weights)
    first, second = (Counter(rows_of(rank.epoch(epoch))) for epoch in range(2))
    other = Counter(rows_of(Rank(LOADERS[0], weights, {"seed": 1}).epoch(0)))
    assert first != second and first != other
    assert first == Counter(rows_of(Rank(LOADERS[0], weights).epoch(0)))


def test_before_training_a_loader_is_the_host_s():
    rank = Rank(LOADERS[0], np.zeros(22))
    assert list(rank.loader) == Rank(LOADERS[0], None).epoch(0)
