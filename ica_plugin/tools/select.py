"""`ica-plugin select`: the best rows of a data file, in the file's own format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..block import check_quantiles
from ..data.scores import read_scores
from ..errors import ICAError
from ..run.files import MOVED_ROWS, SOURCE_ROWS
from ..scorers.combine import in_turn
from .data_file import DataFile, open_data, texts_of
from .near_copies import NearCopies


@dataclass(frozen=True)
class Choice:
    """Which of the scored rows are selected.

    Attributes:
        keep: share of the scored rows, above 0; best first. Without `keep`, `rows` and `band`: 0.5.
        rows: the same as a number.
        band: only rows between these quantiles of the scores, such as 0.25 and 0.75; alone it keeps all of them.
        round_robin: the holdout rows take turns, and each picks, among the rows it was shown to, the best that is left: no kind of
            good example goes without (BIDS, arXiv 2501.12147, does so by influence). Rows that were shown none come last.
        per_source: `FIELD=N`: at most N rows of each value of the data's field.
        max_cosine: a row that is nearer to a better selected one than this is left out: see `near_copies`.
    """

    keep: float | None = None
    rows: int | None = None
    band: tuple[float, float] | None = None
    round_robin: bool = False
    per_source: str | None = None
    max_cosine: float | None = None

    def count(self, scored: int) -> int:
        """How many rows are to be selected; raises ICAError for a number that cannot be."""
        if self.keep is not None and self.rows is not None:
            raise ICAError("--keep and --rows: give one of them.")
        if self.rows is not None:
            if not 0 < self.rows <= scored:
                raise ICAError(f"--rows {self.rows}: {scored} rows have a score; give a number from 1 to that.")
            return self.rows
        if self.keep is None and self.band is not None:
            return scored
        keep = 0.5 if self.keep is None else self.keep
        if not 0 < keep <= 1:
            raise ICAError(f"--keep {keep}: give a share above 0 and up to 1.")
        return max(1, round(keep * scored))


@dataclass(frozen=True)
class Scored:
    """The last score of each row that has a finite one.

    Attributes:
        place: int [n], in the data file.
        score: float64 [n].
        demonstrations: per row, the holdout rows it was shown.
    """

    place: np.ndarray
    score: np.ndarray
    demonstrations: list[list[int]]


def select_rows(scores: Path, data: Path, out: Path, choice: Choice) -> tuple[int, int]:
    """Write the chosen rows, in the file's order, their content untouched.

    Args:
        scores: a file of `ica-plugin score`, or a run's scores.parquet, whose last score of each row counts.
        data: the file that was scored: jsonl (lines are copied as they are), json (a list), csv or parquet.
        out: where to, in the format of `data`.
        choice: which.

    Returns:
        (rows written, rows of `data`). Fewer than asked for are written where quotas and near copies leave no more.

    Raises:
        ICAError: a file that cannot be read, one that was not scored (another number of rows), or scores of rows that the host
            shuffled.
    """
    scored, expected = _last_scores(scores)
    count = choice.count(len(scored.place))
    file = open_data(data)
    if file.count != expected:
        raise ICAError(
            f"the scores are of {expected} rows, but {data} has {file.count}: it is not the file that was scored, or the host dropped "
            "rows (too long, or without a supervised token). Take those out of the data and score again."
        )
    if out.suffix.lower() != data.suffix.lower():
        raise ICAError(f"--out {out}: the rows are written as they are in {data.name}; give a file that ends in {data.suffix}.")
    chosen = sorted(_chosen(_ranked(scored, choice), file, choice, count))
    out.parent.mkdir(parents=True, exist_ok=True)
    file.write(out, chosen)
    return len(chosen), file.count


def _ranked(scored: Scored, choice: Choice) -> list[int]:
    """Places in the data file in the order in which they are to be taken."""
    order = np.argsort(-scored.score, kind="stable")
    if choice.band is not None:
        try:
            low, high = np.quantile(scored.score, check_quantiles(choice.band))
        except ValueError as error:
            raise ICAError(f"--band {choice.band[0]} {choice.band[1]}: give {error}.") from None
        order = order[(scored.score[order] >= low) & (scored.score[order] <= high)]
    if choice.round_robin:
        if not any(scored.demonstrations):
            raise ICAError("--round-robin: no row of these scores was shown a holdout row; score with `ica` or `one_shot`.")
        queues: dict[int, list[int]] = {}
        for i in order.tolist():
            for holdout_row in scored.demonstrations[i]:
                queues.setdefault(holdout_row, []).append(i)
        turns = in_turn([queues[row] for row in sorted(queues)])
        taken = set(turns)
        return scored.place[[*turns, *(i for i in order.tolist() if i not in taken)]].tolist()
    return scored.place[order].tolist()


def _chosen(ranked: list[int], file: DataFile, choice: Choice, count: int) -> list[int]:
    """The first `count` of the ranked rows that quotas and nearness allow."""
    field, quota = _quota(choice.per_source)
    copies = None if choice.max_cosine is None else NearCopies(choice.max_cosine)
    chosen: list[int] = []
    of_source: Counter[str] = Counter()
    for place in ranked:
        if len(chosen) == count:
            break
        row: Any = file.row(place) if field or copies else None
        if field:
            if not isinstance(row, dict) or field not in row:
                raise ICAError(f"--per-source {choice.per_source}: row {place} of the data has no field `{field}`.")
            if of_source[str(row[field])] == quota:
                continue
        if copies is not None and not copies.add(" ".join(texts_of(row))):
            continue
        if field:
            of_source[str(row[field])] += 1
        chosen.append(place)
    return chosen


def _quota(text: str | None) -> tuple[str, int]:
    if text is None:
        return "", 0
    field, _, number = text.rpartition("=")
    if not field or not number.isdigit() or int(number) == 0:
        raise ICAError(
            f"--per-source {text}: give a field of the data and the most rows of each of its values, as in `source=200`."
        )
    return field, int(number)


def _last_scores(path: Path) -> tuple[Scored, int]:
    """The rows that have a finite score and a place in the data file, and the number of rows of the data file."""
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
    shown = table["demos"].take(known).to_pylist() if "demos" in table.column_names else [[]] * len(known)
    return Scored(place[known], score[known], [list(demonstrations or []) for demonstrations in shown]), expected
