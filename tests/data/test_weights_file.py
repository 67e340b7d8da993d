import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ica_plugin.data.scores import TRAIN_ROWS
from ica_plugin.data.store import Example, Rows, Sequence
from ica_plugin.data.weights_file import read_weights
from ica_plugin.errors import ICAError


def rows_of(*supervised: int, first: int = 5) -> Rows:
    """Train rows with these numbers of supervised tokens."""
    sequences = [Sequence(np.arange(first, first + n + 1), np.arange(n + 1) > 0) for n in supervised]
    return Rows.of([Example((sequence,), "sft") for sequence in sequences])


def test_three_formats_give_the_same_weights(tmp_path):
    (tmp_path / "w.csv").write_text("row,weight\n2,0.5\n0,1.5\n1,1\n")
    (tmp_path / "w.jsonl").write_text('{"row": 2, "weight": 0.5}\n{"row": 0, "weight": 1.5}\n{"row": 1, "weight": 1}\n')
    pq.write_table(pa.table({"row": [2, 0, 1], "weight": [0.5, 1.5, 1.0]}), tmp_path / "w.parquet")
    for ending in ("csv", "jsonl", "parquet"):
        assert read_weights(str(tmp_path / f"w.{ending}"), 3).tolist() == [1.5, 1.0, 0.5]


def test_an_earlier_runs_scores_serve_with_their_last_refresh(tmp_path):
    table = pa.table({"row": [0, 1, 0, 1], "refresh": [0, 0, 1, 1], "weight": [9.0, 9.0, 0.5, 1.5], "demos": [[1]] * 4})
    pq.write_table(table, tmp_path / "scores.parquet")
    assert read_weights(str(tmp_path / "scores.parquet"), 2).tolist() == [0.5, 1.5]


def test_scores_of_other_rows_are_refused(tmp_path):
    columns = {"row": [0, 1, 0, 1], "refresh": [0, 0, 1, 1], "weight": [9.0, 9.0, 0.5, 1.5], "tokens": [4, 7, 4, 7]}
    pq.write_table(pa.table(columns), tmp_path / "scores.parquet")
    path = str(tmp_path / "scores.parquet")
    assert read_weights(path, 2, train=rows_of(4, 7)).tolist() == [0.5, 1.5]
    with pytest.raises(ICAError, match="2 of 2 rows have another number of supervised tokens, first row 0"):
        read_weights(path, 2, train=rows_of(7, 4))
    with pytest.raises(ICAError, match="1 of 2 train rows have no weight"):  # fewer rows: no index error
        pq.write_table(pa.table({key: column[::2] for key, column in columns.items()}), tmp_path / "scores.parquet")
        read_weights(path, 2, train=rows_of(4, 7))


def test_weights_made_by_hand_for_rows_that_the_host_moved_are_refused(tmp_path):
    path, train = tmp_path / "w.csv", rows_of(4, 7)
    path.write_text("row,weight\n0,1\n1,2\n")
    assert read_weights(str(path), 2, train=train).tolist() == [1, 2]
    with pytest.raises(
        ICAError, match="must count the trainer's rows, and they do not stand as in the data file: they are shuffled"
    ):
        read_weights(str(path), 2, train=train, moved_rows="they are shuffled")
    path.write_text("row,weight,source\n0,1,alpaca\n1,2,alpaca\n")  # where it came from, not its place
    with pytest.raises(ICAError, match="keep both columns"):
        read_weights(str(path), 2, train=train, moved_rows="they are shuffled")
    path.write_text("row,weight,source\n0,1,1\n1,2,0\n")
    assert read_weights(str(path), 2, train=train, moved_rows="they are shuffled").tolist() == [1, 2]


def test_scores_of_rows_in_another_order_are_noticed_though_all_are_equally_long(tmp_path):
    table = pa.table({"row": [0, 1], "refresh": [0, 0], "weight": [0.5, 1.5], "tokens": [4, 4]})
    train, moved = rows_of(4, 4), "they are shuffled"
    path = str(tmp_path / "scores.parquet")
    pq.write_table(table.replace_schema_metadata({TRAIN_ROWS: train.digest}), path)
    assert read_weights(path, 2, train=train, moved_rows=moved).tolist() == [0.5, 1.5]
    others = rows_of(4, 4, first=6)
    with pytest.raises(ICAError, match="or for these in another order, and rows move here: they are shuffled"):
        read_weights(path, 2, train=others, moved_rows=moved)
    # Where none moves, rows that a template gives other tokens are still the same rows.
    assert read_weights(path, 2, train=others).tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,weight\n0,1\n", "1 of 2 train rows have no weight, first 1"),
        ("row,weight\n0,1\n1,1\n1,2\n", "1 duplicate row\\(s\\), first 1"),
        ("row,weight\n0,1\n1,-1\n", "1 negative weight\\(s\\), first at row 1"),
        ("row,weight\n0,1\n1,nan\n", "1 NaN or infinite weight\\(s\\), first at row 1"),
        ("row,weight\n0,1\n1,1\n7,1\n", "1 unknown row\\(s\\), first 7; the run trains on rows 0 to 1"),
        ("row,weight\n0,0\n1,0\n", "every weight is 0"),
        ("index,weight\n0,1\n", "no column `row`"),
        ("row,weight\n0,heavy\n1,1\n", "column `weight` must hold numbers"),
        ("row,weight\na,1\n1,1\n", "column `row` must hold whole numbers"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "w.csv"
    path.write_text(text)
    with pytest.raises(ICAError, match=message):
        read_weights(str(path), 2)


def test_files_that_are_not_there_or_not_readable(tmp_path):
    with pytest.raises(ICAError, match="no such file"):
        read_weights(str(tmp_path / "no.csv"), 2)
    with pytest.raises(ICAError, match="unknown ending '.pkl'"):
        read_weights("weights.pkl", 2)
    (tmp_path / "bad.parquet").write_bytes(np.arange(5).tobytes())
    with pytest.raises(ICAError, match="cannot be read as parquet"):
        read_weights(str(tmp_path / "bad.parquet"), 2)
