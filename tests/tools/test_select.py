"""`ica-plugin select`: the best rows, in their order, in the file's own format."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ica_plugin.errors import ICAError
from ica_plugin.tools.select import select_rows

SCORES = [0.1, 5.0, None, 3.0, 4.0, -1.0]
BEST = [1, 3, 4]  # the best half of six rows, of which one has no score: two or three
ROWS = [{"text": f'Zeile {i}: ä\n"quoted"', "n": i} for i in range(6)]


@pytest.fixture
def scores(tmp_path):
    path = tmp_path / "scores.parquet"
    # An earlier refresh of a row does not count.
    pq.write_table(pa.table({"row": [5, *range(6)], "refresh": [0, *[1] * 6], "score": [99.0, *SCORES]}), path)
    return path


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))  # without a last line end
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "n"])
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(newline="") as file:
        return [{**row, "n": int(row["n"])} for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_formats(tmp_path, scores, kind):
    data, out = write(tmp_path / f"data.{kind}", ROWS), tmp_path / "deep" / f"out.{kind}"
    assert select_rows(scores, data, out, 0.6) == (3, 6)
    assert read(out) == [ROWS[i] for i in BEST]


@pytest.mark.parametrize("keep, rows", [(1.0, [0, 1, 3, 4, 5]), (0.01, [1]), (0.4, [1, 4])])
def test_share(tmp_path, scores, keep, rows):
    out = tmp_path / "out.jsonl"
    select_rows(scores, write(tmp_path / "data.jsonl", ROWS), out, keep)
    assert [row["n"] for row in read(out)] == rows


def test_rows_that_the_host_moved_are_refused(tmp_path, scores):
    table = pq.read_table(scores).replace_schema_metadata({"ica_moved_rows": "they are shuffled"})
    pq.write_table(table, tmp_path / "run.parquet")
    with pytest.raises(ICAError, match="do not stand as in the data file: they are shuffled. `ica-plugin score"):
        select_rows(tmp_path / "run.parquet", write(tmp_path / "data.jsonl", ROWS), tmp_path / "out.jsonl", 0.5)


def test_wrong_inputs(tmp_path, scores):
    data = write(tmp_path / "data.jsonl", ROWS)
    cases = [
        (scores, write(tmp_path / "short.jsonl", ROWS[:4]), "out.jsonl", 0.5, "the scores are of 6 rows"),
        (scores, data, "out.csv", 0.5, "ends in .jsonl"),
        (scores, data, "out.jsonl", 0.0, "above 0"),
        (scores, tmp_path / "none.jsonl", "out.jsonl", 0.5, "cannot be read"),
        (data, data, "out.jsonl", 0.5, "not a readable parquet"),
    ]
    for source, rows, out, keep, message in cases:
        with pytest.raises(ICAError, match=message):
            select_rows(source, rows, tmp_path / out, keep)
    pq.write_table(pa.table({"row": np.arange(6)}), tmp_path / "other.parquet")
    with pytest.raises(ICAError, match="no column refresh, score"):
        select_rows(tmp_path / "other.parquet", data, tmp_path / "out.jsonl", 0.5)
