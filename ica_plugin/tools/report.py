"""`ica-plugin report`: what a finished run did with its weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..data.scores import read_scores
from ..errors import ICAError
from .against import compared
from .page import write_page
from .report_page import row_table, sections, verdicts
from .row_text import RowText, text_of_run

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


SHOWN_ROWS = 10


def write_report(
    output_dir: Path,
    out: Path | None = None,
    *,
    host: ModuleType | None = None,
    config: Path | None = None,
    against: Path | None = None,
) -> Path:
    """Write a page and its numbers from a run's `ica/scores.parquet` and `ica/run.json`.

    Args:
        output_dir: of the run.
        out: the HTML file; default `{output_dir}/ica/report.html`. The JSON lies beside it.
        host: the host's module, where `config` is given.
        config: the run's, for the text of its rows; loads data and model as the run did.
        against: the `output_dir` of the same run without the block, to say whether it helped.

    Returns:
        the HTML file.

    Raises:
        ICAError: no finished run there, or a run with given weights, which scored nothing, or a config of another run.
    """
    folder = output_dir / "ica"
    if not (folder / "run.json").is_file():
        raise ICAError(
            f"no run of ica_plugin there (looked for {folder / 'run.json'}). Give the `output_dir` of a run with an `ica:` block."
        )
    if not (folder / "scores.parquet").is_file():
        raise ICAError("the run trained with given weights and scored nothing, so there is nothing to report.")
    run = json.loads((folder / "run.json").read_text())
    table = read_scores(folder / "scores.parquet").to_pydict()
    numbers = report_numbers(table, run)
    if against is not None:
        numbers["against"] = compared(output_dir, against)
    text: RowText | None = None if host is None or config is None else text_of_run(host, config, run)
    out = out or folder / "report.html"
    write_page(
        out,
        f"ICA report: {output_dir.name}",
        sections(numbers),
        numbers,
        verdicts=verdicts(numbers),
        rows=row_table(numbers["rows"], table, text),
    )
    return out


def report_numbers(table: dict[str, list], run: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the page.

    Args:
        table: the columns of scores.parquet.
        run: run.json.

    Returns:
        `run` (rows, seconds and overhead: scoring over training), `trained` (with `apply: sample`: number of rows by how often they
        were trained in the whole run, else empty), `refreshes` (one dict each: scores, weights' quantiles,
        effective sample size (Σw)² / Σw² / n), `rows` (one dict each, by their last weight, the highest first), and `gained` and `lost`:
        rows by the change of their weight between their first and last scoring, empty where every row was scored once.
    """
    names = ("row", "refresh", "step", "score", "weight", "tokens", "draws")
    columns = {name: np.array(table[name], dtype=float) for name in names}
    rows = sorted(_rows(columns), key=lambda r: -r["weight"])
    moved = sorted((r for r in rows if r["change"] != 0), key=lambda r: -r["change"])
    return {
        "run": _run(run),
        "trained": _trained(rows, run),
        "refreshes": [_refresh(columns, refresh) for refresh in np.unique(columns["refresh"])],
        "rows": rows,
        "gained": [r for r in moved[:SHOWN_ROWS] if r["change"] > 0],
        "lost": [r for r in moved[::-1][:SHOWN_ROWS] if r["change"] < 0],
    }


def _run(run: dict[str, Any]) -> dict[str, Any]:
    seconds, training = float(run["scoring_seconds"]), float(run["training_seconds"])
    return {
        "rows": run["rows"],
        "holdout rows": run["holdout_rows"],
        "rows also in the holdout": run["rows_in_holdout"],
        "steps": run["steps"],
        "score": run["config"].get("score", "ica"),
        "weighting": run["config"].get("weighting"),
        "apply": run.get("apply"),
        "refreshes": run["refreshes"],
        "scored rows": run["scored_rows"],
        "scoring seconds": seconds,
        "training seconds": training,
        "overhead": seconds / training if training else None,
    }


def _trained(rows: list[dict[str, Any]], run: dict[str, Any]) -> list[dict[str, Any]]:
    if run.get("apply") != "sample":
        return []
    times = np.array([row["times trained"] for row in rows], int)
    kinds = {"never": times == 0, "once": times == 1, "twice": times == 2, "more often": times > 2}
    return [{"trained": name, "rows": int(here.sum()), "share": float(here.mean())} for name, here in kinds.items()]


def _refresh(columns: dict[str, np.ndarray], refresh: float) -> dict[str, Any]:
    here = columns["refresh"] == refresh
    weight, score = columns["weight"][here], columns["score"][here]
    finite = score[np.isfinite(score)]
    return {
        "refresh": int(refresh),
        "step": int(columns["step"][here][0]),
        "rows": int(here.sum()),
        "score mean": float(finite.mean()) if len(finite) else None,
        "score std": float(finite.std()) if len(finite) else None,
        "effective sample size": float(weight.sum() ** 2 / max((weight**2).sum(), 1e-12) / len(weight)),
        "weight min": float(weight.min()),
        "weight max": float(weight.max()),
        "share of weight 0": float((weight == 0).mean()),
        **{f"weight q{int(100 * q)}": float(np.quantile(weight, q)) for q in QUANTILES},
    }


def _rows(columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each row with supervised tokens: its weight and score at its last scoring, and its weight at its first."""
    order = np.lexsort((columns["refresh"], columns["row"]))
    row = columns["row"][order]
    # A row's draws are those until its next refresh, so that the whole run's are their sum.
    places = np.unique(columns["row"], return_inverse=True)[1]
    draws = np.bincount(places, np.nan_to_num(columns["draws"]))
    first, last = order[np.insert(row[1:] != row[:-1], 0, True)], order[np.append(row[1:] != row[:-1], True)]
    return [
        {
            "row": int(columns["row"][b]),
            "weight": float(columns["weight"][b]),
            "first weight": float(columns["weight"][a]),
            "change": float(columns["weight"][b] - columns["weight"][a]),
            "score": float(columns["score"][b]),
            "tokens": int(columns["tokens"][b]),
            "times trained": int(draws[places[b]]),
        }
        for a, b in zip(first, last, strict=True)
        if columns["tokens"][b] > 0
    ]
