"""`ica-plugin select`: the best rows of a data file, in the file's own format."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.scores import read_scores
from ..errors import ICAError
from ..run.files import MOVED_ROWS, SOURCE_ROWS


def select_rows(scores: Path, data: Path, out: Path, keep: float) -> tuple[int, int]:
    """Write the best `keep` share of the scored rows, in the file's order, their content untouched.

    Args:
        scores: a file of `ica-plugin score`, or a run's scores.parquet, whose last score of each row counts.
        data: the file that was scored: jsonl (lines are copied as they are), json (a list), csv or parquet.
        out: where to, in the format of `data`.
        keep: share, above 0.

    Returns:
        (rows written, rows of `data`).

    Raises:
        ICAError: a file that cannot be read, one that was not scored (another number of rows), or scores of rows that the host
            shuffled.
    """
    if not 0 < keep <= 1:
        raise ICAError(f"--keep {keep}: give a share above 0 and up to 1.")
    place, score, expected = _last_scores(scores)
    total, write = _open(data)
    if total != expected:
        raise ICAError(
            f"the scores are of {expected} rows, but {data} has {total}: it is not the file that was scored, or the host dropped rows "
            "(too long, or without a supervised token). Take those out of the data and score again."
        )
    if out.suffix.lower() != data.suffix.lower():
        raise ICAError(f"--out {out}: the rows are written as they are in {data.name}; give a file that ends in {data.suffix}.")
    order = np.argsort(-score, kind="stable")[: max(1, round(keep * len(score)))]
    chosen = np.sort(place[order])
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, chosen)
    return len(chosen), total


def _last_scores(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Place in the data file and score of each row that has a finite score, and the number of rows of the data file."""
    try:
        table = read_scores(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ICAError(f"not a readable parquet file: {error}") from None
    missing = {"row", "refresh", "score"} - set(table.column_names)
    if missing:
        raise ICAError(
            f"no column {', '.join(sorted(missing))}; give a file of `ica-plugin score` or a run's ica/scores.parquet."
        )
    row, refresh = table["row"].to_numpy(), table["refresh"].to_numpy()
    order = np.lexsort((refresh, row))
    last = order[np.append(row[order][1:] != row[order][:-1], True)]
    place = table["source"].to_numpy() if "source" in table.column_names else row
    score = table["score"].to_numpy(zero_copy_only=False).astype(np.float64)
    metadata = table.schema.metadata or {}
    if MOVED_ROWS.encode() in metadata:
        raise ICAError(
            f"its rows do not stand as in the data file: {metadata[MOVED_ROWS.encode()].decode()}. `ica-plugin score <config> "
            "--out scores.parquet` notes each row's place with Axolotl; with LLaMA-Factory take that setting out to score."
        )
    expected = int(metadata.get(SOURCE_ROWS.encode(), len(last)))
    known = last[np.isfinite(score[last]) & (place[last] >= 0)]
    if len(known) == 0:
        raise ICAError("no row has a score.")
    return place[known], score[known], expected


def _open(data: Path) -> tuple[int, Callable[[Path, np.ndarray], Any]]:
    """Number of rows of a data file, and a function that writes some of them to a file of its kind."""
    kind = data.suffix.lower()
    try:
        if kind == ".jsonl":
            lines = [line for line in data.read_bytes().splitlines(keepends=True) if line.strip()]
            lines = [line if line.endswith(b"\n") else line + b"\n" for line in lines]
            return len(lines), lambda out, rows: out.write_bytes(b"".join(lines[i] for i in rows))
        if kind == ".json":
            items = json.loads(data.read_text(encoding="utf-8"))
            if isinstance(items, list):
                return len(items), lambda out, rows: out.write_text(
                    json.dumps([items[i] for i in rows], ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
                )
        if kind == ".csv":
            with data.open(newline="", encoding="utf-8") as file:
                head, *cells = csv.reader(file)
            return len(cells), lambda out, rows: _write_csv(out, [head, *(cells[i] for i in rows)])
        if kind == ".parquet":
            table = pq.read_table(data)
            return table.num_rows, lambda out, rows: pq.write_table(table.take(rows), out)
    except (OSError, ValueError) as error:
        raise ICAError(f"--data {data}: cannot be read: {error}") from None
    raise ICAError(f"--data {data}: give a jsonl, json (a list of rows), csv or parquet file.")


def _write_csv(out: Path, rows: list[list[str]]) -> None:
    with out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
