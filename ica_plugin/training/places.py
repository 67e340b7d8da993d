"""`apply: sample`: which row stands at which place of an epoch.

One object goes in under the host's data loader, in place of its innermost batch sampler: `Places`, which keeps that batch sampler
and asks it for the epoch's batches. So the host's sampler, seeds, grouping and packing have said their word, and accelerate its
own (`prepare_data_loader` recognises a RandomSampler by its class, so nothing may stand around it before), when rows are drawn;
and what comes after, the sharding over ranks, workers, prefetching and the skipping of a resumed run, sees batches of the same
number and sizes as ever. The order of things within an epoch: the host calls `iter(loader)`, which starts nothing, since accelerate's
loaders iterate in a generator; it asks `get_batch_samples` for the first micro-batches, where the rows are scored; the loader's
iterator starts, and with it `Places`. A refresh in steps cannot come that way: see `windows.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from torch.utils.data import BatchSampler

from ..errors import ICAError
from ..weighting.draws import drawn
from .batch_lists import Batch, Fixed, copies, flat, nested, rows_of
from .packed_draws import drawn_and_packed, is_packing


class Places(BatchSampler):
    """Stands for the host's batch sampler, and hands on batches of rows drawn by weight.

    Until `begin`, and in loaders that are not the run's own (some callbacks make one), the batches are the host's.

    Args:
        loader: the host's prepared train loader.
        host: its innermost batch sampler.
        shard: what shards over ranks between the two; None on one rank.
        share: places of an epoch as a share of the host's (`epoch_share`).
        seed: of the draws.

    Attributes:
        together: of the batch sampler's batches, those of one micro-batch on all ranks.
        by_window: rows are drawn window by window, not when an epoch starts.
        host_batches: the running epoch as the host would train it; None before it is asked for.
        plan: the running epoch as it is trained, as far as it is drawn.
        planned: whether something is drawn.
        limit: the micro-batch of the running epoch at which the run ends, if so.
    """

    def __init__(self, loader: Any, host: Any, shard: BatchSamplerShard | None, *, share: float = 1.0, seed: int = 0):
        self.loader, self.host, self.shard = loader, host, shard
        self.share, self.seed = share, seed
        self.packs = is_packing(host)
        self.ranks = shard.num_processes if shard is not None else 1
        self.together = self.ranks if shard is not None and not shard.split_batches else 1
        self.by_window = False
        self._weights: Callable[[], np.ndarray] | None = None
        self._report: Callable[[np.ndarray], None] = lambda rows: None
        self._resumed = False
        self.epoch = 0
        self.forget()

    def forget(self) -> None:
        """An epoch begins."""
        self.host_batches: list[Batch] | None = None
        self.plan: list[Batch] = []
        self.planned = False
        self.limit = 0
        self._allowed: np.ndarray | None = None

    def __getattr__(self, name: str) -> Any:
        # `set_epoch`, `sampler`, `batch_size`, `drop_last`: accelerate asks for all of them.
        if name == "host":  # not there yet
            raise AttributeError(name)
        return getattr(self.host, name)

    @classmethod
    def under(cls, loader: Any, **settings: Any) -> Places | None:
        """Put `Places` under a prepared loader; None where rows cannot be drawn there.

        Args:
            loader: what `get_train_dataloader` returned.
            settings: share, seed.
        """
        # One process fetches for all ranks, or whoever made this loader samples in another way.
        if isinstance(loader, DataLoaderDispatcher) or getattr(loader, "batch_sampler", None) is None:
            return None
        holder, shard = getattr(loader, "base_dataloader", loader), None
        if isinstance(holder.batch_sampler, BatchSamplerShard):
            holder = shard = holder.batch_sampler
        places = cls(loader, holder.batch_sampler, shard, **settings)
        # Past DataLoader's own __setattr__, which keeps users from setting what its other attributes were computed from.
        object.__setattr__(holder, "batch_sampler", places)
        loader.ica_places = places
        return places

    def __len__(self) -> int:
        """Batches of an epoch over all ranks. The host counts its steps by it, before anything is scored."""
        if self.share == 1:
            return len(self.host)
        sizes = _sizes_in_share(self.host, self.share, self.together)
        if sizes is not None:
            return len(sizes)
        count = max(round(self.share * len(self.host)), 1)
        return max(count - count % self.together, self.together) if self.packs else count

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an epoch on this rank."""
        return len(self.shard) if self.shard is not None else len(self)

    def begin(self, weights: Callable[[], np.ndarray], report: Callable[[np.ndarray], None], *, by_window: bool) -> None:
        """From here on the loader is the run's.

        Args:
            weights: the newest weights, float64 [rows].
            report: called with the rows that a draw puts to training, each as often as it will be trained.
            by_window: rows are drawn by `windows.Windows`, not when an epoch starts.
        """
        self._weights, self._report, self.by_window = weights, report, by_window

    def begin_epoch(self, epoch: int, *, last: int) -> bool:
        """The host begins an epoch, or goes on in one that a checkpoint was written in. Returns whether it goes on.

        Args:
            epoch: counted from 0.
            last: micro-batches of it after which the run ends, if so.
        """
        resumed, self._resumed = self._resumed and epoch == self.epoch, False
        if not resumed:
            self.forget()
        self.epoch, self.limit = epoch, last
        if resumed:
            self.allow(self.plan)
        return resumed

    def __iter__(self) -> Iterator[Batch]:
        return self._batches(iter(self.host))  # some batch samplers begin when asked, others at their first batch: as the host's

    def _batches(self, host: Iterator[Batch]) -> Iterator[Batch]:
        batches = copies(host)
        if self._weights is None:
            yield from batches[: len(self)]
            return
        if self.host_batches is None:
            self.host_batches = batches
        if self.by_window:
            yield from copies(batches[: len(self)])  # the shard adds to batches in place
            return
        if not self.planned:
            whole, among = self.whole()
            as_host = self.share == 1 and np.ptp(self._weights()[rows_of(among)]) == 0
            self.plan = copies(batches[: len(whole)]) if as_host else self.drawn(among, whole, self.epoch)
            self.planned = True
            self.allow(self.plan)
            self.report_trained(0, self.limit)
        yield from copies(self.plan)

    def whole(self) -> tuple[list[int], list[Any]]:
        """The sizes of an epoch's batches, and what its rows are drawn from: rows, or batches where the host packs."""
        batches, count = self.host_batches or [], len(self)
        if self.packs and self.by_window:
            # An epoch of packed rows has more or fewer bins than the host counted by other orders, which may leave it shorter. Where
            # it is drawn at once it is filled up instead, so that a resumed run finds its place by the host's count of steps.
            count = min(count, len(batches))
        if self.shard is not None and self.shard.drop_last:
            count -= count % self.together
        # The rows of batches that the host drops at the end of an epoch are not trained in it.
        among = batches[:count] if self.share == 1 else batches
        sizes = None if self.share == 1 else _sizes_in_share(self.host, self.share, self.together)
        if sizes is None:
            sizes = [1] * count if self.packs else [len(batch) for batch in batches[:count]]
        return sizes, among if self.packs else rows_of(among)

    def drawn(self, among: list[Any], sizes: list[int], salt: int) -> list[Batch]:
        """Batches of the sizes `sizes`, of rows drawn from `among`, as `whole` returns both; `salt`: with the seed, decides."""
        if self.packs:
            return drawn_and_packed(self.host, among, len(sizes), lambda order, places: self._draw(order, places, salt))
        rows = self._draw(np.array(among), sum(sizes), salt).tolist()
        ends = np.cumsum(sizes).tolist()
        return [rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def _draw(self, order: np.ndarray, places: int, salt: int) -> np.ndarray:
        assert self._weights is not None
        weights = self._weights()[order]
        if np.isnan(weights).any():
            raise ICAError(
                "rows were asked for before they were scored: this host's data loader begins before its first step. Set `apply: "
                "gradient` in the `ica:` block, and please report the host and its version."
            )
        return drawn(order, weights, places, seed=self.seed, epoch=salt)

    def of_rank(self, rank: int) -> list[Batch]:
        """A rank's micro-batches of the plan, by accelerate's own sharding, which may repeat the epoch's first rows."""
        return self.plan if self.shard is None else _of_rank(self.shard, rank, Fixed(copies(self.plan), self.host.batch_size))

    def of_this_rank(self) -> list[Batch]:
        """This rank's."""
        return self.of_rank(0 if self.shard is None else self.shard.process_index)

    def allow(self, batches: list[Batch]) -> None:
        """These are the rows that `check` lets pass."""
        self._allowed = np.unique(rows_of(batches))

    def report_trained(self, first: int, until: int) -> None:
        """Report the rows of these micro-batches of the plan, of all ranks."""
        trained = [row for rank in range(self.ranks) for row in rows_of(self.of_rank(rank)[first:until])]
        self._report(np.array(trained, np.int64))

    def check(self, rows: np.ndarray) -> None:
        """Rows of a batch about to be trained; raises ICAError where one has no place in the running epoch or window."""
        if self._allowed is None or not np.isin(rows, self._allowed).all():
            raise ICAError(
                "a training batch holds rows that were not drawn, so it did not come by way of the plugin's batch sampler, and the run "
                "would train unweighted. Set `apply: gradient` in the `ica:` block, and please report the host and its version."
            )

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of the running epoch; empty before anything is drawn."""
        if not self.planned:
            return {}
        return flat("places", self.plan) | (flat("order", self.host_batches or []) if self.by_window else {})

    def resume(self, tensors: dict[str, torch.Tensor], epoch: int) -> None:
        """Take over the running epoch of a checkpoint; to be called before its `begin_epoch`."""
        self.plan, self.planned = nested("places", tensors), True
        self.host_batches = nested("order", tensors) if self.by_window else []
        self.epoch, self._resumed = epoch, True


def _of_rank(shard: BatchSamplerShard, rank: int, batches: Fixed) -> list[Batch]:
    shard = copy.copy(shard)
    shard.process_index, shard.batch_sampler = rank, batches
    return list(shard)


def _sizes_in_share(host: Any, share: float, together: int) -> list[int] | None:
    """Rows of each batch of an epoch with a share of the rows as places; None where a batch sampler's sizes are its own affair."""
    if type(host) is not BatchSampler:
        return None
    size = host.batch_size
    places = max(round(share * len(host.sampler)), 1)
    if host.drop_last:
        places = max(places // (size * together), 1) * size * together
    return [size] * (places // size) + [places % size] * (places % size > 0)
