"""`weights: <file>`: a weight per train row from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ICAError
from .scores import TRAIN_ROWS, read_scores
from .store import Rows

SCORE = "Score this config: `ica-plugin score <config> --out scores.parquet`."

READERS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}


def read_weights(path: str, rows: int, train: Rows | None = None, moved_rows: str = "") -> np.ndarray:
    """Read a file with the columns `row` (index into the trainer's train rows) and `weight`, one line per row.

    An earlier run's `ica/scores.parquet` works too: where there is a column `refresh`, each row's last one counts, and its
    column `tokens` must agree with this run's rows, or they are others or in another order. Where the host moves rows, the
    file's own digest of them must be this run's. Weights are used as they are, without scaling.

    Args:
        path: parquet, csv or jsonl.
        rows: number of train rows.
        train: the train rows, where they are known.
        moved_rows: why the train rows do not stand as in the data file, if so. Then a file must show that it means the trainer's
            rows: by a column `source` (the place in the data file, as in a file of `ica-plugin score`) or `refresh`.

    Returns:
        float64 [rows].

    Raises:
        ICAError: missing or malformed file, missing, duplicate or unknown rows, rows of another run, negative or NaN weights,
            or numbers that are those of the data file where the host moves rows.
    """
    where = f"ica.weights: {path}"
    table = _read_table(path, where)
    for column in ("row", "weight"):
        if column not in table.column_names:
            raise ICAError(f"{where}: no column `{column}`; it has {table.column_names}. Needed: row, weight.")
    frame = {name: table[name].to_numpy(zero_copy_only=False) for name in ("row", "weight")}
    index = frame["row"]
    if not np.issubdtype(index.dtype, np.integer):
        raise ICAError(f"{where}: column `row` must hold whole numbers without gaps, found {index.dtype}.")
    try:
        weight = frame["weight"].astype(np.float64)
    except (TypeError, ValueError):
        raise ICAError(f"{where}: column `weight` must hold numbers, found {frame['weight'].dtype}.") from None
    if "refresh" in table.column_names:
        index, weight = _last_of_each_row(table, index, weight, rows, train, where)
    elif moved_rows and not _tells_places(table):
        raise ICAError(
            f"{where}: `row` must count the trainer's rows, and they do not stand as in the data file: {moved_rows}. Or take `row` "
            "and `source` (the place in the data file) from a file of `ica-plugin score`, and keep both columns beside `weight`."
        )
    digest = (table.schema.metadata or {}).get(TRAIN_ROWS.encode(), b"").decode()
    if moved_rows and train is not None and digest not in ("", train.digest):
        raise ICAError(
            f"{where}: it was scored for other rows, or for these in another order, and rows move here: {moved_rows}. {SCORE}"
        )
    unknown = index[(index < 0) | (index >= rows)]
    if len(unknown):
        raise ICAError(f"{where}: {len(unknown)} unknown row(s), first {unknown[0]}; the run trains on rows 0 to {rows - 1}.")
    values, counts = np.unique(index, return_counts=True)
    if (counts > 1).any():
        raise ICAError(f"{where}: {int((counts > 1).sum())} duplicate row(s), first {values[counts > 1][0]}.")
    if len(values) < rows:
        missing = np.setdiff1d(np.arange(rows), values)
        raise ICAError(f"{where}: {len(missing)} of {rows} train rows have no weight, first {missing[0]}.")
    result = np.empty(rows)
    result[index] = weight
    return check_weights(result, where)


def _tells_places(table: pa.Table) -> bool:
    """Whether a table has both the trainer's row and the place in the data file; a text `source` says where a row came from."""
    return "source" in table.column_names and pa.types.is_integer(table.schema.field("source").type)


def _last_of_each_row(
    table: pa.Table, index: np.ndarray, weight: np.ndarray, rows: int, train: Rows | None, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, weights) of the last refresh of each row of a run's scores; raises ICAError where they are scores of other rows."""
    order = np.lexsort((table["refresh"].to_numpy(zero_copy_only=False), index))
    order = order[np.append(index[order][1:] != index[order][:-1], True)]
    index, weight = index[order], weight[order]
    if train is not None and "tokens" in table.column_names:
        counted = table["tokens"].to_numpy(zero_copy_only=False)[order]
        inside = (index >= 0) & (index < rows)
        other = index[inside][counted[inside] != train.supervised[index[inside]]]
        if len(other):
            raise ICAError(
                f"{where}: it was scored for other rows, or for these in another order: {len(other)} of {rows} rows have another "
                f"number of supervised tokens, first row {other[0]}. {SCORE}"
            )
    return index, weight


def check_weights(weights: Any, where: str) -> np.ndarray:
    """Check one weight per row.

    Args:
        weights: [n] numbers.
        where: their source, for messages.

    Raises:
        ICAError: no numbers, NaN, infinite or negative weights, or all 0.
    """
    try:
        weights = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise ICAError(f"{where}: must hold numbers.") from None
    for wrong, name in ((~np.isfinite(weights), "NaN or infinite"), (weights < 0, "negative")):
        if wrong.any():
            raise ICAError(f"{where}: {int(wrong.sum())} {name} weight(s), first at row {int(np.argmax(wrong))}.")
    if not weights.any():
        raise ICAError(f"{where}: every weight is 0, so nothing would be trained.")
    return weights


def _read_table(path: str, where: str) -> pa.Table:
    file = Path(path).expanduser()
    kind = READERS.get(file.suffix.lower())
    if kind is None:
        raise ICAError(f"{where}: unknown ending {file.suffix!r}; give a .parquet, .csv or .jsonl file.")
    if not file.is_file():
        raise ICAError(f"{where}: no such file (looked for {file.absolute()}).")
    try:
        if kind == "parquet":
            return read_scores(file)
        if kind == "csv":
            import pyarrow.csv as pc

            table = pc.read_csv(file)
            _ = table.column_names  # decodes them
            return table
        import pyarrow.json as pj

        return pj.read_json(file)
    except (OSError, ValueError) as error:  # pyarrow's and decoding errors are ValueErrors
        raise ICAError(f"{where}: cannot be read as {kind}: {error}") from None
