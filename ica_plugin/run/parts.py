"""Finished blocks of a scoring on disk, so that one that is killed goes on with its next block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ICAError
from ..log import get_logger
from .files import write_whole
from .fingerprint import differences
from .ranks import Ranks

FACTS = "facts.json"

# Log-probs of one policy differ by no more than this share.
SAME_LOGPROBS = 1e-4


class Parts:
    """The blocks of one scoring, each a parquet file of its own, written whole or not at all.

    They lie where every rank can write. A rank takes of them the rows that are its own, so that the number of processes may
    change between a scoring and its continuation.

    Args:
        folder: theirs alone.
        ranks: the run's processes.
        facts: what must be the same for blocks to be of this scoring (`Scoring.facts`); the same on every rank.
        on_mismatch: `error` stops where the folder holds blocks of another scoring; `rescore` begins anew.
    """

    def __init__(self, folder: Path, ranks: Ranks, facts: Callable[[], dict[str, Any]], on_mismatch: str):
        self.folder = folder
        self._ranks, self._facts, self._on_mismatch = ranks, facts, on_mismatch
        self._told = False

    def begin(self) -> None:
        """Look whether what is there is of this scoring; collective over all ranks.

        Raises:
            ICAError: it is of another, with `on_mismatch: error`.
        """
        facts = json.loads(json.dumps(self._facts()))
        changed = next(filter(None, self._ranks.all(lambda: self._changed(facts))), [])
        if changed and self._on_mismatch == "error":
            raise ICAError(
                f"{self.folder} holds finished blocks of another scoring; what differs: {', '.join(changed)}. Undo the change, or delete "
                "that folder (or set `on_resume_mismatch: rescore`) to score all rows again."
            )
        if changed:
            get_logger().warning("%s differs in %s; all rows are scored again.", self.folder, ", ".join(changed))
            self._ranks.all(self.remove)
        self._write(FACTS, lambda path: path.write_text(json.dumps(facts)))

    def add(self, kind: str, columns: dict[str, Any]) -> None:
        """Write a finished block.

        Args:
            kind: `demonstrations` or `scores`.
            columns: `row` first, and what was found for these rows; no row is in two blocks of a kind.
        """
        table = pa.table({name: pa.array(column, from_pandas=False) for name, column in columns.items()})
        self._write(f"{kind}-{int(columns['row'][0]):09d}.parquet", lambda path: pq.write_table(table, path))

    def demonstrations(self, rows: list[int]) -> dict[int, list[int]]:
        """The demonstrations that were found for some of `rows`."""
        table = self._read("demonstrations", rows)
        return {} if table is None else dict(zip(table["row"].to_pylist(), table["demos"].to_pylist(), strict=True))

    def scores(self, rows: list[int]) -> dict[str, np.ndarray]:
        """The columns of those of `rows` that were scored; none where no row was."""
        table = self._read("scores", rows)
        return {} if table is None else {name: table[name].to_numpy() for name in table.column_names}

    def remove(self) -> None:
        """They have served."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _changed(self, facts: dict[str, Any]) -> list[str]:
        try:
            then = json.loads((self.folder / FACTS).read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError):
            return ["a damaged facts.json"]
        changed = differences(then, facts)
        if not np.allclose(then["logprobs"], facts["logprobs"], rtol=SAME_LOGPROBS, atol=SAME_LOGPROBS, equal_nan=True):
            changed.append("the model's weights")
        return changed

    def _read(self, kind: str, rows: list[int]) -> pa.Table | None:
        tables = []
        for path in sorted(self.folder.glob(f"{kind}-*.parquet")):
            try:
                table = pq.read_table(path)
            except (OSError, pa.ArrowInvalid) as error:
                get_logger().warning("%s cannot be read (%s): its rows are scored again.", path, error)
                continue
            tables.append(table.filter(pa.array(np.isin(table["row"].to_numpy(), rows))))
        found = pa.concat_tables(tables) if tables else None
        return found if found is not None and len(found) else None

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        try:
            write_whole(self.folder / name, write, mark=f"{self._ranks.index}")
        except OSError as error:
            if not self._told:
                get_logger().warning(
                    "%s could not be written (%s). Scoring goes on; if it is killed, these rows are scored again.",
                    self.folder / name,
                    error,
                )
            self._told = True
