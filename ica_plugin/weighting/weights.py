"""Scores → weights with mean 1 over the rows scored together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from ..config import ICAConfig
from ..errors import ICAError
from ..expression import BAND_SCORERS, parse_score

MAX_BAD_SHARE = 0.05


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

    Raises:
        ICAError: more than 5 % of the scores are NaN or infinite, or every weight would be 0.
    """
    scores = np.asarray(scores, dtype=np.float64)
    neutral = np.zeros(len(scores), bool) if neutral is None else neutral
    supervised = tokens > 0
    candidates = supervised & ~neutral
    bad = candidates & ~np.isfinite(scores)
    if bad.sum() > MAX_BAD_SHARE * max(candidates.sum(), 1):
        raise ICAError(
            f"{int(bad.sum())} of {int(candidates.sum())} scores are NaN or infinite (rows "
            f"{np.flatnonzero(bad)[:5].tolist()} …); more than {MAX_BAD_SHARE:.0%} means that the policy itself is broken. "
            "Check the loss of the plain run: a learning rate too high and float16 overflow are the usual causes."
        )
    good = candidates & ~bad
    values = np.zeros(len(scores))
    values[supervised & neutral] = 1.0
    clipped = np.zeros(len(scores), bool)
    if good.any():
        raw = _raw_weights(scores[good], config)
        share = tokens[good].astype(np.float64) if by_token else np.ones(int(good.sum()))
        # Rows with a broken score stay in S with weight 0, so the others carry their share.
        mass = tokens[good | bad].sum() if by_token else (good | bad).sum()
        limit = config.max_weight if config.weighting == "softmax" else np.inf
        if (raw * share).sum() <= 0:
            raise ICAError(f"ica.weighting: {config.weighting}: no row would have a weight above 0; widen it.")
        values[good], clipped[good] = scaled_to_mean_one(raw, share, float(mass), limit)
    return Weights(values, clipped, bad)


def _raw_weights(scores: np.ndarray, config: ICAConfig) -> np.ndarray:
    n = len(scores)
    if config.weighting == "softmax":
        spread = scores.std()
        z = (scores - scores.mean()) / spread if spread > 1e-12 * max(1.0, np.abs(scores).max()) else np.zeros(n)
        return np.exp((z - z.max()) / config.temperature)
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


def scaled_to_mean_one(raw: np.ndarray, share: np.ndarray, mass: float, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """The c with Σ share · min(c · raw, limit) = mass, and the rows at the limit.

    Clipping and scaling in one: what the clipped rows lose goes to the others, so that the mean is 1 and no
    weight is above the limit. The loop ends after at most n rounds, since the clipped set only grows.
    """
    clipped = np.zeros(len(raw), bool)
    while True:
        free = (raw * share)[~clipped].sum()
        rest = mass - (limit * share[clipped].sum() if clipped.any() else 0.0)
        if free <= 0 or rest <= 0:
            # Nothing left to scale: the limit cannot be kept together with a mean of 1.
            return raw * (mass / (raw * share).sum()), np.zeros(len(raw), bool)
        values = raw * (rest / free)
        values[clipped] = limit
        over = (values > limit) & ~clipped
        if not over.any():
            return values, clipped
        clipped |= over
