"""What a run leaves in `{output_dir}/ica/`: scores.parquet and run.json, each written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.scores import PARTS, SCORES, TRAIN_ROWS, score_files
from ..log import get_logger

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("refresh", pa.int64()),
        ("step", pa.int64()),
        ("base_logprob", pa.float64()),
        ("context_logprob", pa.float64()),
        ("score", pa.float64()),
        ("weight", pa.float32()),
        ("tokens", pa.int64()),
        ("demos", pa.list_(pa.int64())),
        ("draws", pa.int64()),
    ]
)


# Types of columns that only some files have; those of scorers are float64.
FURTHER = {"source": pa.int64(), "dropped_tokens": pa.list_(pa.int32())}


# Key of a scores file's metadata: rows of the data file, where not all of them became train rows in their order.
SOURCE_ROWS = "ica_source_rows"


# The same, where the host moved rows and it is not known where to: why they do not stand as in the file.
MOVED_ROWS = "ica_moved_rows"


PACKAGES = ("ica-plugin", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "axolotl", "llamafactory")


class RunFiles:
    """Writes the two files of one run. A full disk or a read-only folder is reported, and the run goes on.

    The first refresh is scores.parquet; each later one is a part of its own beside it, so that a refresh costs what it holds and not
    what the run holds. At the end of training parts and file become one. `read_scores` reads both.

    Attributes:
        moved_rows: why `row` is not the place in the data file; "" where it is.
        train_rows: digest of the rows that `row` counts.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.folder = Path(output_dir) / "ica"
        self.moved_rows = self.train_rows = ""
        self._new = True
        self._part: list[pa.Table] = []  # what the part in hand holds: one refresh, or more where the disk was full
        self._safe = True  # it is on the disk

    def add_scores(self, columns: dict[str, Any]) -> None:
        """Add the rows of one refresh.

        Args:
            columns: the names of SCHEMA, and further ones of float64; NaN becomes null.
        """
        if self._new:  # what an earlier run left here is not this run's
            for path in score_files(self.folder):
                path.unlink(missing_ok=True)
        self._new = False
        self._part = [*([] if self._safe else self._part), score_table(columns)]
        self._write_part()

    def set_draws(self, draws: np.ndarray) -> None:
        """Say of the rows of the newest refresh how often each is trained since; `draws`: int [train rows]."""
        if not self._part:
            self._take_newest()
        if self._part:
            newest = self._part[-1]
            column = pa.array(draws[newest["row"].to_numpy()], pa.int64())
            self._part[-1] = newest.set_column(newest.column_names.index("draws"), "draws", column)
            self._write_part()

    def set_draws_of(self, refresh: int, rows: np.ndarray, draws: np.ndarray) -> None:
        """The same of some rows that were last scored in an earlier refresh, `refresh`.

        Args:
            refresh: number of the refresh.
            rows: int [n].
            draws: int [train rows].
        """
        part = self.folder / PARTS / f"{refresh:06d}.parquet"
        path = part if part.is_file() else self.folder / SCORES
        if not path.is_file():
            return
        table = pq.read_table(path)
        row, column = table["row"].to_numpy(), table["draws"].to_numpy().copy()
        here = (table["refresh"].to_numpy() == refresh) & np.isin(row, rows)
        column[here] = draws[row[here]]
        table = table.set_column(table.column_names.index("draws"), "draws", pa.array(column, pa.int64()))
        self._write(str(path.relative_to(self.folder)), partial(pq.write_table, table))

    def _write_part(self) -> None:
        first = self._part[0]["refresh"][0].as_py()
        name = SCORES if first == 0 or not (self.folder / SCORES).exists() else f"{PARTS}/{first:06d}.parquet"
        table = pa.concat_tables(self._part, promote_options="default")
        table = table.replace_schema_metadata(self._metadata())
        self._safe = self._write(name, lambda path: pq.write_table(table, path))

    def _take_newest(self) -> None:
        """Take the newest refresh in hand, out of the file that a run before a resume may have merged it into."""
        files = score_files(self.folder)
        if not files:
            return
        table = pq.read_table(files[-1])
        newest = pc.equal(table["refresh"], pc.max(table["refresh"]))
        rest = table.filter(pc.invert(newest))
        self._part = [table.filter(newest)]
        if len(rest) and self._write(files[-1].name, partial(pq.write_table, rest)):
            self._write_part()

    def keep_scores(self, refreshes: int) -> None:
        """Keep of the scores here the first `refreshes` refreshes: a resumed run goes on from there."""
        self._new = False
        for path in score_files(self.folder):
            try:
                table = pq.read_table(path)
                kept = table.filter(pc.less(table["refresh"], refreshes))
            except (OSError, pa.ArrowInvalid, KeyError) as error:
                get_logger().warning("%s cannot be read (%s), so it begins anew with refresh %d.", path, error, refreshes)
                path.unlink(missing_ok=True)
                continue
            if len(kept) == 0:
                path.unlink()
            elif len(kept) < len(table):
                self._write(str(path.relative_to(self.folder)), partial(pq.write_table, kept))
        if refreshes and not score_files(self.folder):
            get_logger().warning("%s is not there, so it begins anew with refresh %d.", self.folder / SCORES, refreshes)

    def merge(self) -> None:
        """Training is over: parts and file become one file, a row group for each refresh."""
        files = score_files(self.folder)
        if len(files) < 2:
            return
        schema = pa.unify_schemas([pq.read_schema(path) for path in files])
        if self._write(SCORES, lambda path: _copy(files, path, schema)):
            for path in files[1:]:
                path.unlink()
            files[1].parent.rmdir()

    def write_run(self, record: dict[str, Any]) -> None:
        """Write run.json."""
        text = json.dumps({**record, "versions": versions()}, indent=2, default=str) + "\n"
        self._write("run.json", lambda path: path.write_text(text))

    def _metadata(self) -> dict[str, str] | None:
        known = {TRAIN_ROWS: self.train_rows, MOVED_ROWS: self.moved_rows}
        return {key: value for key, value in known.items() if value} or None

    def _write(self, name: str, write: Callable[[Path], Any]) -> bool:
        """Whether `write` wrote the file, whole."""
        path = self.folder / name
        try:
            write_whole(path, write)
        except OSError as error:
            get_logger().warning(
                "%s could not be written (%s). Training goes on with the right weights; free the disk or fix the folder's "
                "permissions and the next refresh writes it again.",
                path,
                error,
            )
            return False
        return True


class ScoreFile(RunFiles):
    """Writes the scores of `ica-plugin score`, and nothing else, to one file.

    Args:
        path: where.
        source: int64 [train rows], each train row's place in the data file; None where it is the row's own index, or not known.
        source_rows: rows of the data file, where `source` is given.
        moved_rows: as of RunFiles; where `source` is given it does not matter.
        train_rows: as of RunFiles.
    """

    def __init__(
        self,
        path: Path,
        source: np.ndarray | None = None,
        source_rows: int | None = None,
        *,
        moved_rows: str = "",
        train_rows: str = "",
    ):
        self.path, self.source, self.source_rows = path, source, source_rows
        self.moved_rows, self.train_rows = moved_rows if source is None else "", train_rows

    def add_scores(self, columns: dict[str, Any]) -> None:
        if self.source is not None:
            columns = {**columns, "source": self.source[columns["row"]]}
        source = {SOURCE_ROWS: str(self.source_rows)} if self.source_rows is not None else {}
        table = score_table(columns).replace_schema_metadata({**(self._metadata() or {}), **source} or None)
        write_whole(self.path, lambda path: pq.write_table(table, path))

    def write_run(self, record: dict[str, Any]) -> None:
        pass


def write_whole(path: Path, write: Callable[[Path], Any], mark: str = "") -> None:
    """Have `write` write a file, which appears under its name once it is whole.

    Args:
        path: its name; the folder is made.
        write: takes the path to write to.
        mark: tells apart processes that write the same file.

    Raises:
        OSError: it could not be written.
    """
    partial = path.with_name(f".{path.name}.{mark}partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(partial)
    os.replace(partial, path)


def _copy(files: list[Path], path: Path, schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        for file in files:
            table = pq.read_table(file)
            missing = [field for field in schema if field.name not in table.column_names]
            for field in missing:
                table = table.append_column(field, pa.nulls(len(table), field.type))
            writer.write_table(table.select(schema.names).cast(schema))


def score_table(columns: dict[str, Any]) -> pa.Table:
    """The columns of SCHEMA, then the others (float64 where FURTHER does not know them), as a table; NaN becomes null."""
    further = [(name, FURTHER.get(name, pa.float64())) for name in columns if name not in SCHEMA.names]
    schema = pa.schema([*SCHEMA, *further])
    return pa.Table.from_arrays([pa.array(columns[field.name], field.type, from_pandas=True) for field in schema], schema=schema)


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide the result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
