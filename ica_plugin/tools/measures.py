"""What a page says of scores: their spread, how far two agree, and how well one tells good rows from bad."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata, spearmanr

# Scores between these two quantiles differ little, so agreement is read at the ends, which weights and filters act on.
DECILE = 0.1


def spread(scores: np.ndarray) -> dict[str, float | int | None]:
    """Mean, standard deviation and quantiles of the finite scores, None where there are none; and how many are not finite."""
    finite = scores[np.isfinite(scores)]
    quantiles = {f"q{int(100 * q)}": q for q in (0.01, 0.25, 0.5, 0.75, 0.99)}
    known = len(finite) > 0
    return {
        "mean": float(finite.mean()) if known else None,
        "std": float(finite.std()) if known else None,
        **{name: float(np.quantile(finite, q)) if known else None for name, q in quantiles.items()},
        "without a score": int(len(scores) - len(finite)),
    }


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    """Rank correlation, and the share that the best tenths and the worst tenths have in common, over rows that both score."""
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"rank correlation": None, "best tenth shared": None, "worst tenth shared": None}
    size = max(1, round(DECILE * len(a)))
    first, second = np.argsort(-a, kind="stable"), np.argsort(-b, kind="stable")
    return {
        "rank correlation": float(spearmanr(a, b).statistic),
        "best tenth shared": len(set(first[:size]) & set(second[:size])) / size,
        "worst tenth shared": len(set(first[-size:]) & set(second[-size:])) / size,
    }


def auroc(scores: np.ndarray, clean: int) -> float | None:
    """Chance that one of the first `clean` rows scores above one of the others; ties count half."""
    good, bad = (part[np.isfinite(part)] for part in (scores[:clean], scores[clean:]))
    if not len(good) or not len(bad):
        return None
    ranks = rankdata(np.concatenate([good, bad]))[: len(good)]
    return float((ranks.sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad)))
