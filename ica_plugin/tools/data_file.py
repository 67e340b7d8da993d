"""A data file of rows: read, and some of its rows written again in the file's own format."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..errors import ICAError


@dataclass(frozen=True)
class DataFile:
    """The rows of a jsonl, json (a list), csv or parquet file.

    Attributes:
        count: number of rows.
        row: row `i` as the file has it, usually a dict.
        write: writes some rows to a file, their content untouched; lines of jsonl byte for byte.
    """

    count: int
    row: Callable[[int], Any]
    write: Callable[[Path, list[int]], Any]


def open_data(data: Path) -> DataFile:
    """Read a data file.

    Raises:
        ICAError: a file that cannot be read, or of another format.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(data.suffix.lower())
    found = None
    if reader is not None:
        try:
            found = reader(data)
        except (OSError, ValueError) as error:
            raise ICAError(f"--data {data}: cannot be read: {error}") from None
    if found is None:
        raise ICAError(f"--data {data}: give a jsonl, json (a list of rows), csv or parquet file.")
    return found


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a row, in its order, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner)


def _jsonl(data: Path) -> DataFile:
    lines = [line for line in data.read_bytes().splitlines(keepends=True) if line.strip()]
    lines = [line if line.endswith(b"\n") else line + b"\n" for line in lines]
    return DataFile(
        len(lines), lambda i: json.loads(lines[i]), lambda out, rows: out.write_bytes(b"".join(lines[i] for i in rows))
    )


def _json(data: Path) -> DataFile | None:
    items = json.loads(data.read_text(encoding="utf-8"))
    if not isinstance(items, list):
        return None

    def write(out: Path, rows: list[int]) -> None:
        out.write_text(json.dumps([items[i] for i in rows], ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    return DataFile(len(items), lambda i: items[i], write)


def _csv(data: Path) -> DataFile:
    with data.open(newline="", encoding="utf-8") as file:
        head, *cells = csv.reader(file)

    def write(out: Path, rows: list[int]) -> None:
        with out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *(cells[i] for i in rows)])

    return DataFile(len(cells), lambda i: dict(zip(head, cells[i], strict=False)), write)


def _parquet(data: Path) -> DataFile:
    table = pq.read_table(data)
    return DataFile(
        table.num_rows,
        lambda i: table.slice(i, 1).to_pylist()[0],
        lambda out, rows: pq.write_table(table.take(rows), out),
    )
