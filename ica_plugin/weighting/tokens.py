"""Token weights: supervised tokens that stay surprising after good examples are left out of the loss.

A token that the policy still finds unlikely once it has read the demonstrations is noise (an altered number, another problem's
answer); one that is unlikely only without them (the holdout's format) is what the row is there to teach. No reference model is needed,
as Rho-1 (arXiv 2404.07965) and Token Cleaning (arXiv 2502.01968) need one.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ..data.store import Sequence

# With `auto` the threshold lies where this share of the holdout's own tokens is below it.
GOOD_SHARE = 0.01
# Of so many holdout rows at most; their tokens are some thousands, enough for a quantile of 1 %.
CALIBRATION_ROWS = 100


def threshold(logprobs: np.ndarray, share: float) -> float:
    """The log-prob below which `share` of the tokens lie.

    Args:
        logprobs: float [tokens], nats, finite or not; only finite ones count.
        share: between 0 and 1.
    """
    finite = logprobs[np.isfinite(logprobs)]
    return float(np.quantile(finite, share)) if len(finite) else -np.inf


def ends(row: Sequence, special: Collection[int]) -> np.ndarray:
    """bool [supervised tokens]: the last token of each turn that is trained, and special tokens, which say where turns end.

    Args:
        row: with its mask.
        special: ids of the tokenizer's special tokens.
    """
    last = row.scored & ~np.append(row.scored[1:], False)
    return (last | np.isin(row.tokens, list(special)))[row.scored]


def kept(logprobs: np.ndarray, limit: float, always: np.ndarray) -> np.ndarray:
    """Which supervised tokens of a row stay in the loss.

    Args:
        logprobs: float, in context, of the first supervised tokens: of all, of as many as `score_tokens` says, or none, where the row
            has no demonstration. The others stay.
        limit: tokens below it go.
        always: bool [supervised tokens], those that never go.

    Returns:
        bool [supervised tokens]; all True where none but those that never go would stay and there are none of these.
    """
    stay = np.ones(len(always), bool)
    stay[: len(logprobs)] = ~(logprobs < limit) | always[: len(logprobs)]
    return stay if stay.any() else np.ones(len(always), bool)


def scale(weights: np.ndarray, tokens: np.ndarray, left: np.ndarray) -> float:
    """What the kept tokens are multiplied by, so that leaving tokens out changes nothing in the mean over all.

    Args:
        weights: float [rows], how much, or how often, each row is trained.
        tokens: int [rows], supervised tokens.
        left: int [rows], those kept.

    Returns:
        Σ weights · tokens / Σ weights · left.
    """
    remaining = float((weights * left).sum())
    return float((weights * tokens).sum()) / remaining if remaining else 1.0
