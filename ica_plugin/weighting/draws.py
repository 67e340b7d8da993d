"""Weights → how often each row is trained in an epoch or window, and at which places."""

from __future__ import annotations

import numpy as np

# Weights are counted in parts of this size, so that sums are exact whatever the number of rows (2³¹ places fit).
PARTS = 1 << 32


def draw(weights: np.ndarray, places: int, *, seed: int, epoch: int) -> np.ndarray:
    """How often each row is trained, by systematic resampling (Kitagawa 1996; Douc and Cappé 2005, section 2.4).

    With w the weights scaled to the sum `places`, d_i is ⌊w_i⌋ or ⌈w_i⌉ and E[d_i] = w_i. One random number decides: rows in
    their order are laid end to end, each as long as its weight, and every whole step from a random start hits one. So a run of
    neighbouring rows, a source that stands together, is drawn as often as its weights sum to, give or take one. Equal weights
    are drawn once each.

    Args:
        weights: float [n], 0 or more, not all 0.
        places: number of places to fill.
        seed, epoch: what the start is drawn from.

    Returns:
        int64 [n], with the sum `places`.
    """
    parts = np.round(np.asarray(weights, np.float64) * (places / np.sum(weights, dtype=np.float64)) * PARTS).astype(np.int64)
    parts[int(parts.argmax())] += places * PARTS - parts.sum()  # what rounding left over
    start = int(np.random.default_rng([seed, epoch]).integers(PARTS))
    ends = np.cumsum(parts) + start
    return np.diff(ends // PARTS, prepend=start // PARTS)


def fill(order: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The rows of an epoch, in the order in which they are trained.

    A row that is drawn keeps its own place in the host's order. The places of rows that are not drawn go to the further copies
    of others, each as near as can be to where an even spread over the epoch would put it. Places left over are dropped.

    Args:
        order: int [n], the host's order: rows by place, each at most once.
        draws: int [rows], how often each row is trained.

    Returns:
        int [Σ draws[order]]; `order` itself where every row is drawn once.
    """
    times = draws[order]
    own, free = np.flatnonzero(times > 0), np.flatnonzero(times == 0)
    extra = np.repeat(own, times[own] - 1)
    # Copy c of d stands c/d of an epoch behind the row's own place.
    copy = np.arange(len(extra)) - np.repeat(np.cumsum(times[own] - 1) - (times[own] - 1), times[own] - 1) + 1
    wanted = (extra + copy * len(order) / times[extra]) % max(len(order), 1)
    extra = extra[np.argsort(wanted, kind="stable")]
    # Free places are taken evenly where there are more of them than copies.
    taken = free[(np.arange(len(extra)) * len(free)) // max(len(extra), 1)]
    source = np.full(len(order), -1)
    source[own], source[taken] = own, extra
    return order[source[source >= 0]]


def drawn(order: np.ndarray, weights: np.ndarray, places: int, *, seed: int, epoch: int) -> np.ndarray:
    """`places` rows drawn by weight from `order`, in the order in which they are trained: `draw`, then `fill`.

    Args:
        order: int [n], the host's order, each row at most once.
        weights: float [n], of the rows in that order; all 0 counts as all equal.
        places: number of places; it may be more than n, where short rows are drawn for long ones.
        seed, epoch: what the draw is made from. It does not depend on the order, so every rank and every resume draws alike.

    Returns:
        int [places].
    """
    weights = weights if weights.any() else np.ones(len(order))
    by_row = np.argsort(order, kind="stable")
    draws = np.empty(len(order), np.int64)
    draws[by_row] = draw(weights[by_row], places, seed=seed, epoch=epoch)
    # Places beyond the host's are spread among its own.
    count = len(order)
    spread = np.full(max(places, count), -1)
    spread[np.arange(count) * len(spread) // count] = np.arange(count)
    spread[spread < 0] = np.arange(count, len(spread))
    return order[fill(spread, np.append(draws, np.zeros(len(spread) - count, np.int64)))]
