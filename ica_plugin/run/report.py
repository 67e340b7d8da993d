"""What a person reads while the run goes: log lines, and metrics through the host's own log."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from transformers import Trainer

from ..config import ICAConfig
from ..log import get_logger
from ..weighting.weights import Weights

# Weights within fewer rows than this say little.
FEW_ROWS = 16
# Under Adam, a step below this share of its length is warned about.
SHORT_STEP = 0.7


@dataclass(frozen=True)
class Refreshed:
    """One refresh, for people.

    Attributes:
        number: of the refresh, from 0.
        rows: int64 [n], its rows.
        scores: float64 [n], NaN where a row was not scored.
        flat: names of the scores that are the same for every row.
        scored: rows scored themselves.
        weights: of the rows.
        seconds: that it took.
        overhead: scoring seconds of the run so far over its training seconds.
        shares: of the weight, by the holdout set that drew it; empty where there is one holdout without a name.
    """

    number: int
    rows: np.ndarray
    scores: np.ndarray
    flat: list[str]
    scored: int
    weights: Weights
    seconds: float
    overhead: float
    shares: dict[str, float]


@dataclass(frozen=True)
class TokensLeftOut:
    """What `drop_tokens` left out of the rows of one refresh, for people.

    Attributes:
        share: of their supervised tokens.
        limit: log-prob below which a token goes, nats.
        most: (text, times left out, times it stands in the rows) of the tokens that were left out most.
        in_good_rows: texts of tokens that are left out often though they stand in most holdout rows.
    """

    share: float
    limit: float
    most: list[tuple[str, int, int]]
    in_good_rows: list[str]


class Report:
    """Log lines and metrics of one run.

    Args:
        trainer: the host's.
        config: the block.
    """

    def __init__(self, trainer: Trainer, config: ICAConfig):
        self._trainer, self._config = trainer, config

    def refreshed(self, refresh: Refreshed) -> None:
        """Say what a refresh did."""
        weights, finite = refresh.weights, refresh.scores[np.isfinite(refresh.scores)]
        mean, spread = (float(finite.mean()), float(finite.std())) if len(finite) else (0.0, 0.0)
        share_clipped = float(weights.clipped.mean())
        get_logger().info(
            "refresh %d at step %d: %d rows scored in %.1f s; score %.2f ± %.2f%s; weights %.3g to %.3g, effective "
            "sample size %.0f %%, %.1f %% of rows at max_weight.",
            refresh.number,
            self._trainer.state.global_step,
            refresh.scored,
            refresh.seconds,
            mean,
            spread,
            " nats" if self._config.score == "ica" else "",
            weights.values.min(),
            weights.values.max(),
            100 * weights.effective_sample_size,
            100 * share_clipped,
        )
        self._say_what_adam_does(weights.effective_sample_size)
        if refresh.flat:
            get_logger().warning(
                "%s: every row has the same score, so it tells no row from another%s. The policy has not moved from its reference yet, "
                "or something is wrong.",
                ", ".join(refresh.flat),
                " and nothing is reweighted" if "score" in refresh.flat else "",
            )
        if weights.bad.any():
            bad = refresh.rows[weights.bad]
            get_logger().warning("%d row(s) have a NaN or infinite score and weight 0: %s", len(bad), bad[:10].tolist())
        self._log(
            {
                "ica/score_mean": mean,
                "ica/score_std": spread,
                "ica/effective_sample_size": weights.effective_sample_size,
                "ica/clipped_share": share_clipped,
                "ica/scoring_seconds": refresh.seconds,
                "ica/overhead": refresh.overhead,
                **{f"ica/weight_share/{name}": share for name, share in refresh.shares.items()},
            }
        )

    def within_budget(self, scored: int, rows: int, correlation: float | None) -> None:
        """Say how far the budget reached, and how well scored rows speak for the others."""
        get_logger().info(
            "ica.budget: %d of %d rows scored; the others have their neighbours' weight (rank correlation on the rows scored so far: %s).",
            scored,
            rows,
            "too few to tell" if correlation is None else f"{correlation:.2f}",
        )
        self._log(
            {"ica/scored_share": scored / rows} | ({} if correlation is None else {"ica/neighbour_correlation": correlation})
        )

    def tokens_left_out(self, found: TokensLeftOut) -> None:
        """Say which tokens are left out of the loss, so that it can be seen whether it is digits or a format."""
        get_logger().info(
            "drop_tokens: %.2f %% of the supervised tokens are left out of the loss, those below %.2f nats after the demonstrations. Most "
            "often: %s.",
            100 * found.share,
            found.limit,
            ", ".join(f"{text!r} {count} of {all}" for text, count, all in found.most) or "none",
        )
        if found.in_good_rows:
            get_logger().warning(
                "drop_tokens: %s: left out often, though most holdout rows have it. If it belongs to the format that is to be learnt, lower "
                "`drop_tokens`, or remove it.",
                ", ".join(map(repr, found.in_good_rows)),
            )
        self._log({"ica/tokens_left_out": found.share})

    def given(self, values: np.ndarray) -> None:
        """Say that given weights are trained with. `values`: float64 [rows]."""
        nothing = np.zeros(len(values), bool)
        size = Weights(values, nothing, nothing).effective_sample_size
        get_logger().info(
            "training with given weights: %d rows, mean %.3g, %.3g to %.3g, effective sample size %.0f %%; nothing is scored.",
            len(values),
            values.mean(),
            values.min(),
            values.max(),
            100 * size,
        )
        self._say_what_adam_does(size)
        self._log({"ica/effective_sample_size": size})

    def _say_what_adam_does(self, size: float) -> None:
        """Adam divides a constant scale out, so what unequal weights take from the noise they take from the step: about √ESS."""
        optimizer = type(
            getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)
        ).__name__  # below accelerate's wrapper
        factor = size**0.5
        if self._config.apply != "gradient" or factor > 0.995 or "adam" not in optimizer.lower():
            return
        get_logger().log(
            logging.WARNING if factor < SHORT_STEP else logging.INFO,
            "under %s these weights shorten the step to about %.2f of its length where gradients are noisy (√ of the effective sample "
            "size). Raise the learning rate by as much, or use `apply: sample`, which costs no step.",
            optimizer,
            factor,
        )

    def drawn(self, draws: np.ndarray) -> None:
        """Say who will be trained how often. `draws`: int [rows], in the epoch or window that begins."""
        distinct, places = int((draws > 0).sum()), int(draws.sum())
        get_logger().info(
            "%d places from step %d on: %d distinct rows drawn, the most often drawn %d times.",
            places,
            self._trainer.state.global_step,
            distinct,
            draws.max(),
        )
        self._log({"ica/distinct_share": distinct / max(places, 1)})

    def small_window(self, rows: int, train_rows: int) -> None:
        """Warn where a window has too few rows to weigh them against each other."""
        if rows < min(FEW_ROWS, train_rows):
            get_logger().warning(
                "ica.refresh_interval: a window is %d row(s), and rows are weighted against the others of their window alone%s. Take a longer "
                "`refresh_interval`, or `refresh_scope: all`.",
                rows,
                ": every weight is 1, and nothing is reweighted" if rows == 1 else "",
            )

    def _log(self, metrics: dict[str, float]) -> None:
        # transformers' own method: TRL's override would flush its half-collected metrics here.
        Trainer.log(self._trainer, metrics)
