"""One score from several scorers and several holdout sets: ranks, z-scores, bands."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from ..expression import BAND_SCORERS, Balance, Combine, Terms


def combined(terms: Terms, parts: dict[str, np.ndarray], *, combine: Combine, band: tuple[float, float]) -> np.ndarray:
    """The score of the rows scored together from the scores of each scorer.

    A single scorer's score is its own, without its factor but with its sign. A sum adds `factor · rank / n` or `factor · z-score`, taken
    over the rows for which every scorer has a finite score; the other rows are NaN.

    Args:
        terms: of `parse_score`.
        parts: float [n] for each of `parts_of(terms)`.
        combine: `rank` or `zscore`.
        band: quantiles of the middle band, for `ica-irm` and `lossdiff-irm`.

    Returns:
        float64 [n].
    """
    columns = [
        in_band([parts[part] for part in BAND_SCORERS[name]], band) if name in BAND_SCORERS else parts[name] for _, name in terms
    ]
    if len(columns) == 1:
        return columns[0] if terms[0][0] > 0 else -columns[0]
    result = np.full(len(columns[0]), np.nan)
    finite = np.isfinite(columns).all(axis=0)
    if finite.any():
        result[finite] = sum(factor * scaled(column[finite], combine) for (factor, _), column in zip(terms, columns, strict=True))
    return result


def scaled(scores: np.ndarray, combine: Combine) -> np.ndarray:
    """Finite scores as ranks in (0, 1] (equal scores share a rank) or as z-scores (0 where all are equal)."""
    if combine == "rank":
        return rankdata(scores) / len(scores)
    spread = scores.std()
    return (scores - scores.mean()) / spread if spread > 1e-12 * max(1.0, np.abs(scores).max()) else np.zeros(len(scores))


def without_spread(columns: dict[str, np.ndarray]) -> list[str]:
    """Names of the columns whose finite scores, two or more, are all the same: they tell no row from another, as where a scorer
    silently did nothing.

    Args:
        columns: float [n] by name, of the rows scored together.
    """
    finite = {name: column[np.isfinite(column)] for name, column in columns.items()}
    return [name for name, scores in finite.items() if len(scores) > 1 and not scaled(scores, "zscore").any()]


def balanced(scores: list[np.ndarray], balance: Balance, combine: Combine) -> np.ndarray:
    """One score from the scores against several holdout sets, each normalised first so that no set's scale decides.

    `mean` and `max` are over the sets for which the row has a score. `round_robin`: the sets take turns, each picks the row
    that is best for it among those left, and an earlier pick is a higher score: every prefix serves all sets alike, as the
    balanced selection of BIDS (arXiv 2501.12147) aims at, which normalises influence per target before it picks.

    Args:
        scores: float64 [n] per set.
        balance: mean, max or round_robin.
        combine: `rank` or `zscore`, the normalisation.

    Returns:
        float64 [n]; NaN for a row without any score.
    """
    grid = on_one_scale(scores, combine)
    known = np.isfinite(grid)
    if balance == "max":
        result = grid.max(axis=0)
    elif balance == "mean":
        result = np.where(known, grid, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    else:
        result = _picked_in_turn(grid)
    return np.where(known.any(axis=0), result, np.nan)


def on_one_scale(scores: list[np.ndarray], combine: Combine) -> np.ndarray:
    """float64 [sets, n]: the scores against each set, normalised within it; −inf where a row has none."""
    grid = np.full((len(scores), len(scores[0])), -np.inf)
    for line, column in zip(grid, scores, strict=True):
        finite = np.isfinite(column)
        if finite.any():
            line[finite] = scaled(column[finite], combine)
    return grid


def _picked_in_turn(grid: np.ndarray) -> np.ndarray:
    """(n − place) / n, where place counts the picks of sets that take turns. `grid`: [sets, n], −inf where a set has no score."""
    n = grid.shape[1]
    result = np.zeros(n)
    result[in_turn([np.argsort(-line, kind="stable").tolist() for line in grid])] = np.arange(n, 0, -1) / n
    return result


def in_turn(queues: list[list[int]]) -> list[int]:
    """The order in which rows are picked where queues take turns, and each picks the first of its rows that is left.

    Args:
        queues: rows, best first; a row may stand in several.

    Returns:
        every row of the queues, once.
    """
    waiting = [iter(queue) for queue in queues]
    picked: dict[int, None] = {}
    while waiting:
        still = []
        for queue in waiting:
            row = next((row for row in queue if row not in picked), None)
            if row is not None:
                picked[row] = None
                still.append(queue)
        waiting = still
    return list(picked)


def in_band(columns: list[np.ndarray], band: tuple[float, float]) -> np.ndarray:
    """How deep in the middle band both scorers place each pair (arXiv 2510.13212 keeps the intersection of the two bands).

    With q the quantile of a score among the finite ones, from 0 to 1, a scorer's depth is min(q − low, high − q): 0 or more
    inside the band, negative outside. The result is the smaller depth, so that the kept pairs are those at 0 and above.
    """
    finite = np.isfinite(columns).all(axis=0)
    result = np.full(len(columns[0]), np.nan)
    quantiles = [(rankdata(column[finite]) - 0.5) / max(int(finite.sum()), 1) for column in columns]
    result[finite] = np.min([np.minimum(q - band[0], band[1] - q) for q in quantiles], axis=0)
    return result
