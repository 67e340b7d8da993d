"""One-shot gain: the reverse of ICA, how much a row helps the holdout when it is the demonstration."""

from __future__ import annotations

import numpy as np

from ..data.store import Sequence
from ..policy.losses import token_means
from .context import ScoringContext
from .in_context import ROWS_PER_BLOCK, in_context
from .needs import Needs

NAME = "one_shot"
SOURCE = "Nuggets, arXiv 2312.10302, eq. 2 to 4"
NEEDS = Needs(demonstrations=True)


def score(context: ScoringContext) -> np.ndarray:
    """`mean over h of [s(h | row) − s(h)]`, with s the mean log-prob per token of the holdout row's response (pairs: chosen
    less rejected), and h the row's demonstrations under `retrieval`, its nearest holdout rows.

    Nuggets (arXiv 2312.10302, eq. 2 to 4) asks for how many rows of a fixed task set the one-shot score is above the zero-shot
    one; the ICA paper (arXiv 2510.14459) compares with it. Here the k nearest holdout rows stand for the set, which bounds
    the cost by that of ICA, and the gain itself stands for its sign, which takes k + 1 values only.

    Returns:
        float64 [n], nats per token; NaN where no holdout row fits behind the row. Negative for undesirable rows.
    """
    holdout, limit = context.holdout.examples, np.inf if context.limit is None else context.limit
    rows = context.whole
    needed = sorted({d for demonstrations in context.demonstrations for d in demonstrations})
    alone = context.once.setdefault("alone", {})
    new = [d for d in needed if d not in alone]
    shown = [context.beginning(holdout[d]) for d in new]
    alone.update(zip(new, token_means(context.logprob_sums(shown), shown), strict=True))
    result = np.full(len(context.rows), np.nan)
    scored = [i for i, row in enumerate(rows) if row.can_be_scored]
    for start in range(0, len(scored), ROWS_PER_BLOCK):
        pairs = [
            (i, d)
            for i in scored[start : start + ROWS_PER_BLOCK]
            for d in context.demonstrations[i]
            if len(rows[i].demonstration.tokens) + holdout[d].longest <= limit
        ]
        flat: list[Sequence] = [
            in_context(sequence, [rows[i].demonstration])
            for i, d in pairs
            for sequence in context.beginning(holdout[d]).sequences
        ]
        if not pairs:
            continue
        sums = context.engine.logprobs(flat, context.progress).reshape(len(pairs), -1)
        gains = token_means(sums, [context.beginning(holdout[d]) for _, d in pairs]) - np.array([alone[d] for _, d in pairs])
        of_row = np.array([i for i, _ in pairs])
        for i in np.unique(of_row):
            result[i] = gains[of_row == i].mean()
    return context.sign * result
