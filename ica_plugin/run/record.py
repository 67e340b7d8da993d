"""run.json: what a run was, and what it did so far."""

from __future__ import annotations

from typing import Any

from ..data.public import public_block
from .clock import Clock
from .drawing import Drawing
from .refresh import Refresh


def run_record(refresh: Refresh, clock: Clock, drawing: Drawing | None) -> dict[str, Any]:
    """The content of run.json, but for the versions.

    Args:
        refresh: of the run, with what it scores and what it knows of the rows.
        clock: of the run.
        drawing: of the run, where rows are drawn.
    """
    scoring, counts = refresh.scoring, refresh.state.counts
    return {
        "config": public_block(scoring.config),
        "length_normalize": scoring.length_normalize,
        "apply": scoring.config.apply,
        "distinct_rows": None if drawing is None else int(drawing.ever.sum()),
        "never_drawn": None if drawing is None else int((~drawing.ever).sum()),
        "rows": len(scoring.train),
        "train_rows_digest": scoring.train.digest,
        "holdout_rows": len(scoring.holdout.examples),
        "tokens_left_out": None if refresh.dropping is None else round(float(refresh.dropping.left_out), 6),
        "rows_in_holdout": scoring.holdout.rows_in_train,
        "rows_without_supervised_token": int((refresh.tokens == 0).sum()),
        "scored_rows": counts.scored_rows,
        "scored_share": counts.scored_rows / max(counts.weighted_rows, 1),
        "neighbour_correlation": refresh.neighbour_correlation,
        "refreshes": counts.refreshes,
        "steps": scoring.trainer.state.global_step,
        "scoring_seconds": round(clock.scoring_seconds, 3),
        "training_seconds": round(clock.training_seconds, 3),
    }
