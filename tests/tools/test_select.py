"""`ica-plugin select`: the best rows, in their order, in the file's own format."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ica_plugin.errors import ICAError
from ica_plugin.tools.select import Choice, select_rows

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
    assert select_rows(scores, data, out, Choice(0.6)) == (3, 6)
    assert read(out) == [ROWS[i] for i in BEST]


@pytest.mark.parametrize("keep, rows", [(1.0, [0, 1, 3, 4, 5]), (0.01, [1]), (0.4, [1, 4])])
def test_share(tmp_path, scores, keep, rows):
    out = tmp_path / "out.jsonl"
    select_rows(scores, write(tmp_path / "data.jsonl", ROWS), out, Choice(keep))
    assert [row["n"] for row in read(out)] == rows


def test_rows_that_the_host_moved_are_refused(tmp_path, scores):
    table = pq.read_table(scores).replace_schema_metadata({"ica_moved_rows": "they are shuffled"})
    pq.write_table(table, tmp_path / "run.parquet")
    with pytest.raises(ICAError, match="do not stand as in the data file: they are shuffled. `ica-plugin score"):
        select_rows(tmp_path / "run.parquet", write(tmp_path / "data.jsonl", ROWS), tmp_path / "out.jsonl", Choice())


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
            select_rows(source, rows, tmp_path / out, Choice(keep))
    pq.write_table(pa.table({"row": np.arange(6)}), tmp_path / "other.parquet")
    with pytest.raises(ICAError, match="no column refresh, score"):
        select_rows(tmp_path / "other.parquet", data, tmp_path / "out.jsonl", Choice())


@pytest.mark.parametrize(
    "choice, rows",
    [
        (Choice(), [1, 4]),
        (Choice(rows=3), [1, 3, 4]),
        (Choice(band=(0.2, 0.8)), [0, 3, 4]),  # of −1, 0.1, 3, 4, 5
        (Choice(band=(0.2, 0.8), rows=1), [4]),
    ],
)
def test_how_many(tmp_path, scores, choice, rows):
    out = tmp_path / "out.jsonl"
    select_rows(scores, write(tmp_path / "data.jsonl", ROWS), out, choice)
    assert [row["n"] for row in read(out)] == rows


def test_holdout_rows_pick_in_turn(tmp_path):
    """Of ten rows the five best all look like holdout row 7; three others do like row 2, one like row 9, one like nothing."""
    shown = [[7], [7], [7], [7], [7], [2], [2], [2, 9], [], [9]]
    table = pa.table({"row": range(10), "refresh": [0] * 10, "score": [float(10 - i) for i in range(10)], "demos": shown})
    pq.write_table(table, tmp_path / "scores.parquet")
    data, out = write(tmp_path / "data.jsonl", [{"n": i} for i in range(10)]), tmp_path / "out.jsonl"
    found = []
    for count in range(1, 11):
        select_rows(tmp_path / "scores.parquet", data, out, Choice(rows=count, round_robin=True))
        (new,) = {row["n"] for row in read(out)} - set(found)
        found.append(new)
    # holdout row 2 picks 5, 7 picks 0, 9 picks 7; then 6, 1, 9; then row 7 alone; the row without demonstrations last
    assert found == [5, 0, 7, 6, 1, 9, 2, 3, 4, 8]


def test_quotas_and_near_copies(tmp_path, scores):
    texts = [
        "How many eggs are there? Twelve eggs are in the basket, since six and six are twelve.",
        "How many eggs are there? Twelve eggs are in the bucket, since six and six are twelve.",
        "How far is it? The station is three kilometres away, so that walking takes forty minutes.",
    ]
    rows = [{"from": "ab"[i % 2], "messages": [{"content": texts[i // 2]}]} for i in range(6)]
    data, out = write(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    # by score: 1, 4, 3, 0, 5; row 2 has none
    assert select_rows(scores, data, out, Choice(1.0, per_source="from=1")) == (2, 6)
    assert read(out) == [rows[1], rows[4]]
    # 1 and 0 are one text, 3 is nearly the same, and so are 4 and 5
    assert select_rows(scores, data, out, Choice(1.0, max_cosine=0.9)) == (2, 6)
    assert read(out) == [rows[1], rows[4]]
    assert select_rows(scores, data, out, Choice(1.0, max_cosine=0.98)) == (3, 6)
    assert read(out) == [rows[1], rows[3], rows[4]]


@pytest.mark.parametrize(
    "choice, message",
    [
        (Choice(0.5, 3), "give one of them"),
        (Choice(rows=6), "5 rows have a score"),
        (Choice(band=(0.8, 0.2)), "--band 0.8 0.2"),
        (Choice(round_robin=True), "was shown a holdout row"),
        (Choice(per_source="n"), "as in `source=200`"),
        (Choice(per_source="source=2"), "row 1 of the data has no field `source`"),
        (Choice(max_cosine=1.5), "above 0 and below 1"),
    ],
)
def test_wrong_choices(tmp_path, scores, choice, message):
    with pytest.raises(ICAError, match=message):
        select_rows(scores, write(tmp_path / "data.jsonl", ROWS), tmp_path / "out.jsonl", choice)
