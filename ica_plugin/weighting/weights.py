"""Scores → weights with mean 1 over the rows scored together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from ..config import ICAConfig
from ..errors import ICAError
from ..expression import BAND_SCORERS, parse_score

# So many rows may have a NaN or infinite score: a share, and in a small window a few.
MAX_BAD_SHARE = 0.05
MAX_BAD_ROWS = 2


@dataclass(frozen=True)
class Weights:
    """Weights of the rows scored together.

    Attributes:
        values: float64 [n]; mean 1 over the rows, by supervised token where `tokens` was given.
        clipped: bool [n]; rows at `max_weight`.
        bad: bool [n]; rows whose score is NaN or infinite, and whose weight is therefore 0.
    """

    values: np.ndarray
    clipped: np.ndarray
    bad: np.ndarray

    @property
    def effective_sample_size(self) -> float:
        """(Σw)² / Σw² as a share of the rows (Kish): 1 when all weights are equal, 1/n when one row has all."""
        total = float((self.values**2).sum())
        return float(self.values.sum()) ** 2 / total / max(len(self.values), 1) if total > 0 else 0.0


def weights_from_scores(
    scores: np.ndarray,
    config: ICAConfig,
    *,
    tokens: np.ndarray,
    by_token: bool,
    neutral: np.ndarray | None = None,
    rows: np.ndarray | None = None,
) -> Weights:
    """Turn the scores of the set S of rows scored together into weights (docs: how scores become gradients).

    `softmax`: w ∝ exp(z / temperature), z = (s − mean) / std, none above `max_weight`. `minmax` (arXiv 2510.14459,
    eq. 9): w ∝ (s − min) / (max − min) after clipping s to its `winsorize` quantiles. `rank`: w ∝ rank / n.
    `top`, `band`: 1 or 0, where rows that tie at the cut of `top` share what is left (band: arXiv 2510.13212). All scaled
    to mean 1 over S; where all scores are equal, all weights are.

    Args:
        scores: float [n], nats.
        config: the block.
        tokens: int [n], supervised tokens; rows without any get weight 0 and are not in S.
        by_token: the mean is over supervised tokens (the host's loss is a token mean) instead of rows.
        neutral: bool [n]; rows that could not be shown a demonstration. They have no score and weight 1.
        rows: int [n], the rows' ids, which a message names; default: 0 … n − 1.

    Raises:
        ICAError: more than 5 % of the scores, and more than 2, are NaN or infinite, or all are; or every weight would be 0.
    """
    scores = np.asarray(scores, dtype=np.float64)
    neutral = np.zeros(len(scores), bool) if neutral is None else neutral
    supervised = tokens > 0
    candidates = supervised & ~neutral
    bad = candidates & ~np.isfinite(scores)
    good = candidates & ~bad
    _check_bad(np.flatnonzero(bad) if rows is None else rows[bad], int(candidates.sum()))
    values = np.zeros(len(scores))
    values[supervised & neutral] = 1.0
    clipped = np.zeros(len(scores), bool)
    if good.any():
        share = tokens[good].astype(np.float64) if by_token else np.ones(int(good.sum()))
        # Rows with a broken score stay in S with weight 0, so the others carry their share.
        mass = float(tokens[good | bad].sum() if by_token else (good | bad).sum())
        if config.weighting == "softmax":
            values[good], clipped[good] = limited(_exponents(scores[good], config.temperature), share, mass, config.max_weight)
        else:
            raw = _raw_weights(scores[good], config)
            if (raw * share).sum() <= 0:
                raise ICAError(f"ica.weighting: {config.weighting}: no row would have a weight above 0; widen it.")
            values[good] = raw * (mass / (raw * share).sum())
    return Weights(values, clipped, bad)


def _check_bad(rows: np.ndarray, candidates: int) -> None:
    """Broken rows are data; broken scores on the whole are a broken policy. In a small window one row is many per cent."""
    if not len(rows) or (len(rows) <= max(MAX_BAD_SHARE * candidates, MAX_BAD_ROWS) and len(rows) < candidates):
        return
    raise ICAError(
        f"{len(rows)} of {candidates} scores are NaN or infinite (rows {', '.join(map(str, rows[:5].tolist()))}"
        f"{' …' if len(rows) > 5 else ''}); more than {MAX_BAD_SHARE:.0%} and more than {MAX_BAD_ROWS}, or all, means that the policy "
        "itself is broken. Check the loss of the plain run: a learning rate too high and float16 overflow are the usual causes."
    )


def _exponents(scores: np.ndarray, temperature: float) -> np.ndarray:
    """The logarithm of the softmax weights, up to a constant. Its exponential would underflow at a low temperature."""
    spread = scores.std()
    if spread <= 1e-12 * max(1.0, np.abs(scores).max()):
        return np.zeros(len(scores))
    return (scores - scores.mean()) / spread / temperature


def _raw_weights(scores: np.ndarray, config: ICAConfig) -> np.ndarray:
    if config.weighting == "auto":
        raise ValueError("the block is not resolved, see ICAConfig.resolved")
    n = len(scores)
    if config.weighting == "minmax":
        low, high = np.quantile(scores, [config.winsorize, 1 - config.winsorize])
        clipped = np.clip(scores, low, high)
        return (clipped - low) / (high - low) if high > low else np.ones(n)
    if config.weighting == "rank":
        return rankdata(scores) / n
    if config.weighting == "top":
        count = max(1, round(config.keep * n))
        last = np.sort(scores)[n - count]
        above, level = scores > last, scores == last
        return above + level * ((count - above.sum()) / level.sum())
    names = [name for _, name in parse_score(config.score)]
    if len(names) == 1 and names[0] in BAND_SCORERS:  # its scores are depths in that band already
        return (scores >= 0).astype(np.float64)
    low, high = np.quantile(scores, config.band)
    return ((scores >= low) & (scores <= high)).astype(np.float64)


def limited(exponents: np.ndarray, share: np.ndarray, mass: float, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights w = min(c · exp(exponents), limit) with Σ share · w = mass, and which of them are at the limit.

    Clipping and scaling in one: what the clipped rows lose goes to the others, so that the mean is 1 and no weight is above the
    limit. Which rows are clipped is found exactly: they are the first so many by exponent, the fewest for which the next fits. All
    in logarithms, where nothing underflows. Rows of exponent −∞ share evenly what the others cannot take. Where even the limit
    on every row is less than the mass, every row is at the limit.

    Args:
        exponents: float64 [n], −∞ allowed.
        share: float64 [n], above 0.
        mass: what the weights must come to.
        limit: at most this for each.
    """
    n = len(exponents)
    order = np.argsort(-exponents, kind="stable")
    falling, portions = exponents[order], share[order]
    # By number of clipped rows: what is left for the others, and the logarithm of what they come to unscaled.
    left = mass - limit * np.cumsum(portions)
    if left[-1] >= 0:
        return np.full(n, limit), np.ones(n, bool)
    rest = np.concatenate([[mass], left[:-1]])
    unscaled = np.logaddexp.accumulate((falling + np.log(portions))[::-1])[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        fits = falling + np.log(np.maximum(rest, 0.0)) - unscaled <= np.log(limit)
    # A row that could take all that is left fits, whatever rounding says; so one does.
    count = int(np.argmax(fits | (left <= 0) | np.isneginf(falling)))
    others = falling[count:]
    raw = np.ones(n - count) if np.isneginf(others[0]) else np.exp(others - others[0])
    weights, clipped = np.full(n, limit), np.zeros(n, bool)
    clipped[order[:count]] = True
    weights[order[count:]] = np.minimum(raw * (rest[count] / (raw * portions[count:]).sum()), limit)
    return weights, clipped
