"""`ica-plugin audit`: what the scorers say of given data and a given model, before anyone spends a training run."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..data.public import public_source
from ..errors import ICAError
from ..run.callback import ICACallback
from ..weighting.weights import weights_from_scores
from .audit_page import row_table, sections
from .audit_verdicts import verdicts
from .measures import agreement, spread
from .page import write_page
from .row_text import RowText
from .sample import Columns, Sample, parts_in

ALWAYS = ("ica", "likelihood", "ica + likelihood", "one_shot", "rds", "random")


WITH_ADAPTER = ("influence",)


FEWEST_ROWS = 20


def write_audit(host: ModuleType, config: Path, out: Path, *, rows: int, planted: int, scorers: list[str] | None) -> Path:
    """Score a sample of the train rows in every way, and write what it shows as one HTML file with JSON beside it.

    Args:
        host: the host's module, with `attached`.
        config: the host's config; nothing is trained, except by `rho` and `lossdiff` if asked for.
        out: the HTML file.
        rows: train rows in the sample, drawn by the block's seed.
        planted: rows of the sample that are also scored corrupted.
        scorers: what stands under `score:`, each one; default: all that the run's rows and model allow without training.

    Returns:
        the HTML file.

    Raises:
        ICAError: what is wrong with the config, or a scorer that is not defined for it.
    """
    callback, _ = host.attached(config, {})
    if callback.trainer.accelerator.num_processes > 1:
        raise ICAError("the audit runs in one process; start it without a launcher.")
    numbers = audit_numbers(callback, rows=rows, planted=planted, scorers=scorers)
    write_page(
        out, f"ICA audit: {config.name}", sections(numbers), numbers, verdicts=verdicts(numbers), rows=row_table(numbers["rows"])
    )
    return out


def audit_numbers(callback: ICACallback, *, rows: int, planted: int, scorers: list[str] | None = None) -> dict[str, Any]:
    """The numbers of the page; see `write_audit`.

    Returns:
        `data` (counts), `scores` (one dict per scorer: mean, std, quantiles, seconds), `agreement` (one dict per pair of
        scorers: rank correlation, overlap of the best and of the worst tenth, chance is 0.1), `influence` (the same of each
        scorer with exact influence; empty for a full finetune), `sensitivity` (of ICA), `noise` (AUROC by kind of
        corruption and scorer: 1 ranks every clean row above its corrupted copies, 0.5 is chance; `noise left out` has the kinds
        that fewer than 5 of the planted rows allow), `tokens` (the same of altered tokens against untouched ones, where a corruption
        keeps the others in their places), `rows` (the sample's, best first by the block's own score, with the weight that
        they would have among themselves and their text) and `values` (the sample's scores by scorer).
    """
    rng = np.random.default_rng(callback.config.seed)
    scorable = np.flatnonzero(callback.train.can_be_scored)
    if len(scorable) < FEWEST_ROWS:
        raise ICAError(f"an audit needs at least {FEWEST_ROWS} train rows with supervised tokens, and there are {len(scorable)}.")
    sample = Sample(callback, sorted(rng.choice(scorable, min(rows, len(scorable)), replace=False).tolist()))
    own = callback.config.score
    names = list(dict.fromkeys([*(scorers or _defined(callback)), own]))
    sample.score(names)
    values = {name: sample.total(name) for name in names}
    noise, of_tokens, left_out = sample.noise(names, planted, rng)
    return {
        "data": _data(callback, scorable) | {"rows in the sample": len(sample.rows), "score of the config": own},
        "scores": [_described(name, values[name], sample) for name in names],
        "agreement": [
            {"scorer": a, "with": b, **agreement(values[a], values[b])} for i, a in enumerate(names) for b in names[i + 1 :]
        ],
        "influence": [{"scorer": name, **agreement(values[name], values["influence"])} for name in names if name != "influence"]
        if "influence" in names
        else [],
        "sensitivity": sample.sensitivity(),
        "noise": noise,
        "tokens": of_tokens,
        "noise left out": left_out,
        "rows": _rows(sample, values),
        "values": {name: column.tolist() for name, column in values.items()},
    }


def _data(callback: ICACallback, scorable: np.ndarray) -> dict[str, Any]:
    train, holdout = callback.train, callback.holdout
    return {
        "train rows": len(train),
        "kind": train.kind,
        "holdout": public_source(callback.config.holdout),
        "default score": callback.config.model_copy(update={"score": "auto"}).resolved(train.kind, draws=True).score,
        "without supervised tokens": len(train) - len(scorable),
        "holdout rows": len(holdout.examples),
        "shown as demonstrations": len(holdout.shown),
        "train rows that are also in the holdout": holdout.rows_in_train,
        "median supervised tokens": float(np.median(train.supervised[scorable])),
    }


def _described(name: str, scores: np.ndarray, sample: Sample) -> dict[str, Any]:
    return {"scorer": name, **spread(scores), "seconds, alone": sum(sample.seconds[part] for part in parts_in([name]))}


def _rows(sample: Sample, values: Columns) -> list[dict[str, Any]]:
    """The sample by the block's own score, the best first; rows without one last."""
    callback = sample.callback
    own, text = values[callback.config.score], RowText(callback)
    try:
        weights = weights_from_scores(own, callback.config, tokens=callback.train.supervised[sample.rows], by_token=False).values
    except ICAError:  # too many rows without a score to weigh the others, which the scores' table says
        weights = np.full(len(own), np.nan)
    return [
        {
            "row": sample.rows[i],
            "weight": float(weights[i]),
            **{name: float(column[i]) for name, column in values.items()},
            **text.of_row(sample.rows[i]),
            "demonstrations": text.of_demonstrations(sample.demonstrations[i]),
        }
        for i in np.argsort(-own, kind="stable").tolist()
    ]


def _defined(callback: ICACallback) -> list[str]:
    """Scorers that this run allows and that train nothing."""
    adapter = hasattr(callback.trainer.model, "peft_config")
    pairs = callback.train.kind == "pair"
    return [*ALWAYS, *(WITH_ADAPTER if adapter else ()), *(("irm", "ica-irm") if adapter and pairs else ())]
