"""`drop_tokens`: at each refresh, which supervised tokens of its rows are left out of the loss."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from ..data.store import Rows
from ..errors import ICAError
from ..scorers import CONTEXT_TOKENS, most_likely
from ..scorers.in_context import beginning, in_context
from ..weighting.tokens import CALIBRATION_ROWS, GOOD_SHARE, ends, kept, scale, threshold
from .ranks import Ranks
from .report import Report, TokensLeftOut
from .scoring import Scoring
from .token_weights import TokenWeights

# The threshold is found anew once so many times its own rows were scored, so that it costs a tenth of scoring at most.
CALIBRATE_EVERY = 10
SHOWN_TOKENS = 10
# A token that stands in this share of the holdout's answers, and is dropped in this share of its places, is worth a warning.
IN_MOST, DROPPED_OFTEN, SEEN_OFTEN = 0.5, 0.1, 10


def holdout_tokens(scoring: Scoring, rows: list[int]) -> list[np.ndarray]:
    """Log-probs of the supervised tokens of holdout rows, each after other holdout rows: how surprising a good token may be.

    Args:
        scoring: of the run.
        rows: indices of holdout rows.

    Returns:
        float32 [scored tokens] of each; none where no other row fits before it.
    """
    examples = Rows.of(scoring.holdout.examples)
    by_content: dict[str, set[int]] = {}
    for index, row in enumerate(examples):
        by_content.setdefault(row.demonstration.digest, set()).add(index)
    hidden = [frozenset(by_content[row.demonstration.digest]) for row in examples]  # itself, and what is equal to it
    holdout = replace(scoring.holdout, hidden_from=hidden)
    of_sets = []
    for name in holdout.sets:
        shown = scoring.find_demonstrations(rows, holdout=holdout.only(name), train=examples)
        after = [
            in_context(
                beginning(examples[row], scoring.config.score_tokens).demonstration,
                [examples[other].demonstration for other in others],
            )
            for row, others in zip(rows, shown, strict=True)
        ]
        tokens: list[np.ndarray] = []
        scoring.engine.logprobs(after, tokens=tokens)
        of_sets.append([found if others else found[:0] for found, others in zip(tokens, shown, strict=True)])
    return [most_likely(of_row) for of_row in zip(*of_sets, strict=True)]


class TokenDropping:
    """Finds the threshold and the tokens below it.

    Args:
        scoring: of the run.
        ranks: the run's processes.
        report: tells people.

    Attributes:
        weights: what was decided of every row; also the run's state.
        left_out: tokens left out of the newest refresh's rows, as a share of their supervised tokens.
    """

    def __init__(self, scoring: Scoring, ranks: Ranks, report: Report):
        self._scoring, self._ranks, self._report = scoring, ranks, report
        self.weights = TokenWeights(scoring.train)
        self.left_out = 0.0
        tokenizer = getattr(scoring.trainer.processing_class, "tokenizer", scoring.trainer.processing_class)
        self._decode = getattr(tokenizer, "decode", str)
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))

    def __call__(self, columns: dict[str, np.ndarray], weights: np.ndarray, scored_rows: int) -> list[np.ndarray]:
        """Decide for the rows of a refresh; alike on every rank, collective.

        Args:
            columns: of the scoring, every rank's rows.
            weights: float64 [n], of the rows.
            scored_rows: of the run before this refresh.

        Returns:
            for each row int64 places of its tokens that are left out.

        Raises:
            ICAError: the holdout has no token to find the threshold by.
        """
        rows, logprobs = columns["row"], columns[CONTEXT_TOKENS]
        limit = self._limit(logprobs, scored_rows, len(rows))
        sequences = [self._scoring.train[row].sequences[0] for row in rows.tolist()]
        scorable = self._scoring.train.can_be_scored[rows]
        always = [ends(row, self._special) if can else np.zeros(0, bool) for row, can in zip(sequences, scorable, strict=True)]
        stay = [kept(values, limit, last) for values, last in zip(logprobs, always, strict=True)]
        tokens, left = (np.array([count(part) for part in stay]) for count in (len, np.count_nonzero))
        factor = scale(weights, tokens, left)
        self.weights.give(rows, stay, factor)
        self.left_out = 1 - left.sum() / max(tokens.sum(), 1)
        dropped = [
            np.flatnonzero(row.scored)[~part] if can else np.zeros(0, int)
            for row, part, can in zip(sequences, stay, scorable, strict=True)
        ]
        self._report.tokens_left_out(self._described(sequences, dropped, limit))
        return dropped

    def _limit(self, logprobs: np.ndarray, scored_rows: int, rows: int) -> float:
        """The threshold of this refresh: a quantile of its own tokens, or of the holdout's, kept for a while."""
        share = self._scoring.config.drop_tokens
        if share != "auto":
            assert share is not None
            return threshold(np.concatenate([np.zeros(0), *logprobs]), float(share))
        known, holdout = self.weights, self._scoring.holdout
        picked = holdout.shown[:CALIBRATION_ROWS]
        if np.isnan(known.limit) or scored_rows + rows - known.calibrated >= CALIBRATE_EVERY * len(picked):
            parts = self._ranks.all(lambda: holdout_tokens(self._scoring, self._ranks.share(picked)))
            found = np.concatenate([np.zeros(0), *(values for part in parts for values in part)])
            if not len(found):
                raise ICAError(
                    "ica.drop_tokens: auto: no holdout row can be shown another one, so that it is not known how surprising a good token may "
                    "be. Give at least two different holdout rows that fit the model's context together, or a share as in 0.05."
                )
            known.limit, known.calibrated = threshold(found, GOOD_SHARE), scored_rows + rows
        return known.limit

    def _described(self, sequences: list[Any], dropped: list[np.ndarray], limit: float) -> TokensLeftOut:
        gone = Counter(token for row, places in zip(sequences, dropped, strict=True) for token in row.tokens[places].tolist())
        trained = Counter(token for row in sequences for token in row.tokens[row.scored].tolist())
        answers = [set(row.demonstration.tokens[row.demonstration.scored].tolist()) for row in self._scoring.holdout.examples]
        good = Counter(token for answer in answers for token in answer)
        missed = [
            token
            for token, count in gone.most_common()
            if good[token] >= IN_MOST * len(answers) and trained[token] >= SEEN_OFTEN and count >= DROPPED_OFTEN * trained[token]
        ]
        return TokensLeftOut(
            self.left_out,
            limit,
            [(self._decode([token]), count, trained[token]) for token, count in gone.most_common(SHOWN_TOKENS)],
            [self._decode([token]) for token in missed],
        )
