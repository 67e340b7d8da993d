"""`ica-plugin audit`: what the scorers say of given data and a given model, before anyone spends a training run."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import ICAError
from ..run.callback import ICACallback
from .audit_page import sections
from .measures import agreement, spread
from .page import write_page
from .sample import Sample, parts_in

ALWAYS = ("ica", "likelihood", "ica + likelihood", "one_shot", "rds", "random")


WITH_ADAPTER = ("influence",)


SHOWN_ROWS = 5


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
    write_page(out, f"ICA audit: {config.name}", sections(numbers), numbers)
    return out


def audit_numbers(callback: ICACallback, *, rows: int, planted: int, scorers: list[str] | None = None) -> dict[str, Any]:
    """The numbers of the page; see `write_audit`.

    Returns:
        `data` (counts), `scores` (one dict per scorer: mean, std, quantiles, seconds), `agreement` (one dict per pair of
        scorers: rank correlation, overlap of the best and of the worst tenth, chance is 0.1), `influence` (the same of each
        scorer with exact influence; empty for a full finetune), `sensitivity` (of ICA), `noise` (AUROC by kind of
        corruption and scorer: 1 ranks every clean row above its corrupted copies, 0.5 is chance; `noise left out` has the kinds
        that fewer than 5 of the planted rows allow), `best` and `worst` rows
        by the block's own score, with their text, and `values` (the sample's scores by scorer).
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
    ranked = np.argsort(-values[own], kind="stable")
    ranked = ranked[np.isfinite(values[own][ranked])]
    noise, left_out = sample.noise(names, planted, rng)
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
        "noise left out": left_out,
        "best": [_shown(sample, i, values[own]) for i in ranked[:SHOWN_ROWS].tolist()],
        "worst": [_shown(sample, i, values[own]) for i in ranked[::-1][:SHOWN_ROWS].tolist()],
        "values": {name: column.tolist() for name, column in values.items()},
    }


def _data(callback: ICACallback, scorable: np.ndarray) -> dict[str, Any]:
    train, holdout = callback.train, callback.holdout
    return {
        "train rows": len(train),
        "kind": train.kind,
        "without supervised tokens": len(train) - len(scorable),
        "holdout rows": len(holdout.examples),
        "shown as demonstrations": len(holdout.shown),
        "train rows that are also in the holdout": holdout.rows_in_train,
        "median supervised tokens": float(np.median(train.supervised[scorable])),
    }


def _described(name: str, scores: np.ndarray, sample: Sample) -> dict[str, Any]:
    return {"scorer": name, **spread(scores), "seconds, alone": sum(sample.seconds[part] for part in parts_in([name]))}


def _shown(sample: Sample, index: int, scores: np.ndarray) -> dict[str, Any]:
    return {"row": sample.rows[index], "score": float(scores[index]), **sample.text(index)}


def _defined(callback: ICACallback) -> list[str]:
    """Scorers that this run allows and that train nothing."""
    adapter = hasattr(callback.trainer.model, "peft_config")
    pairs = callback.train.kind == "pair"
    return [*ALWAYS, *(WITH_ADAPTER if adapter else ()), *(("irm", "ica-irm") if adapter and pairs else ())]
