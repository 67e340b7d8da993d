"""`Places` under Axolotl's packing, on one and two ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from axolotl.monkeypatch.data.batch_dataset_fetcher import apply_multipack_dataloader_patch
from axolotl.utils.samplers import MultipackBatchSampler
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from loaders import Rank, rows_of

N = 120
LENGTHS = np.random.default_rng(1).integers(5, 60, N)
MODES = {
    "first fit": {},
    "real batches": {"batch_size": 2, "batch_max_len": 64},
    "in order": {"sequential": True},
    "groups": {"group_size": 37},
    "few in a bin": {"bin_size": 2},
}
RANKS = [{"num_processes": 1, "process_index": 0}, {"num_processes": 2, "process_index": 0}]
WEIGHTS = {
    "any": np.random.default_rng(0).gamma(1.0, 1.0, N),
    "long rows": LENGTHS.astype(float) ** 2,
    "short rows": 1.0 / LENGTHS**2,
    "few rows": (np.arange(N) % 20 == 0).astype(float),
}


def loader(mode: str) -> DataLoader:
    settings = {"batch_size": 1, "batch_max_len": 128, "bin_size": 200, "num_processes": 1, **MODES[mode]}
    sampler = SequentialSampler(range(N)) if mode == "in order" else RandomSampler(range(N))
    batches = MultipackBatchSampler(sampler, lengths=LENGTHS, drop_last=True, **settings)
    len(batches)  # as Axolotl does
    return DataLoader(range(N), batch_sampler=batches, collate_fn=list)


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setattr("axolotl.utils.samplers.multipack.gc.collect", lambda: 0)  # a second each
    apply_multipack_dataloader_patch()


def ranks_of(mode, weights, ranks, **places):
    return [
        Rank(lambda: loader(mode), weights, places, **{**ranks, "process_index": i, "even_batches": False})
        for i in range(ranks["num_processes"])
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("window", [{}, {"window": 5}, {"window": 5, "rest": True}], ids=str)
def test_packed(mode, ranks, window):
    host = [[rank.epoch(epoch) for epoch in range(3)] for rank in ranks_of(mode, None, ranks)]
    equal = [[rank.epoch(epoch, **window) for epoch in range(3)] for rank in ranks_of(mode, np.ones(N), ranks, candidates=1)]
    assert equal == host
    for name, weights in WEIGHTS.items():
        ranked = ranks_of(mode, weights, ranks)
        found = [[rank.epoch(epoch, **window) for epoch in range(3)] for rank in ranked]
        trained = Counter(rows_of(found))
        assert all(sum(rank.reported, Counter()) == trained for rank in ranked), name
        for rank, of_rank, of_host in zip(ranked, found, host, strict=True):
            steps = [len(epoch) for epoch in of_host] if window else [len(rank.loader)] * 3
            assert [len(epoch) for epoch in of_rank] == steps, name
        bins = [bin_ for rank in found for epoch in rank for batch in epoch for bin_ in batch]
        limit = MODES[mode].get("batch_max_len", 128)
        assert max(LENGTHS[bin_].sum() for bin_ in bins) <= limit
        if mode == "first fit":
            full = np.mean([LENGTHS[bin_].sum() for bin_ in bins]) / limit
            assert full > (0.8 if window else 0.85), (name, full)  # each window ends with a bin that is not full
        assert max(len(bin_) for bin_ in bins) <= MODES[mode].get("bin_size", 200)
        if window == {} and name in ("any", "few rows"):
            counts = np.array([trained[row] for row in range(N)])
            assert np.corrcoef(counts, weights)[0, 1] > 0.9


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("window", [{}, {"window": 5}], ids=str)
def test_a_share(ranks, window):
    whole = ranks_of("first fit", None, ranks)[0]
    for share in (0.2, 0.5):
        ranked = ranks_of("first fit", WEIGHTS["any"], ranks, share=share)
        assert abs(len(ranked[0].loader) - share * len(whole.loader)) <= 1
        found = [rank.epoch(0, **window) for rank in ranked]
        assert [len(rank) for rank in found] == [len(rank.loader) for rank in ranked]
        assert ranked[0].reported and sum(ranked[0].reported, Counter()) == Counter(rows_of(found))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_resumed_within_an_epoch(mode, ranks, window):
    """accelerate's skipping does not tell Axolotl's batch sampler the epoch, which then goes on with bins of another order."""
    for rank, again in zip(ranks_of(mode, WEIGHTS["any"], ranks), ranks_of(mode, WEIGHTS["any"], ranks), strict=True):
        rank.epoch(0, window)
        states = []
        batches = rank.epoch(1, window, each=lambda: states.append(rank.state()))
        states = states or [rank.state()] * len(batches)
        for done in (1, 4, len(batches) - 1):
            assert again.resumed(1, states[done - 1], done, window) == batches[done:], done
