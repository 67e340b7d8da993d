"""Where a run's scores lie: one file, and while the run goes a part beside it for each further refresh."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SCORES, PARTS = "scores.parquet", "scores"

# Key of a scores file's metadata: the digest of the train rows, in their order, whose numbers its column `row` has.
TRAIN_ROWS = "ica_train_rows"


def score_files(folder: Path) -> list[Path]:
    """The files in a run's `ica` folder that hold its scores, in the order of their refreshes."""
    return [path for path in (folder / SCORES, *sorted((folder / PARTS).glob("*.parquet"))) if path.is_file()]


def read_scores(path: Path) -> pa.Table:
    """A scores file with the parts that lie beside it, where its run has not ended.

    Args:
        path: a scores.parquet.

    Raises:
        OSError, pyarrow.ArrowInvalid: a file that cannot be read.
    """
    parts = sorted((path.parent / PARTS).glob("*.parquet")) if path.name == SCORES else []
    tables = [pq.read_table(part) for part in (path, *parts)]
    return pa.concat_tables(tables, promote_options="default") if parts else tables[0]
