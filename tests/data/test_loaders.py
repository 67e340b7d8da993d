"""What every host's holdout loader does alike."""

import pytest
from datasets import Dataset

import tiny
from ica_plugin import attach
from ica_plugin.config import parse_config
from ica_plugin.data.loaders import HoldoutLoader, Source, expanded, local_path
from ica_plugin.data.read import one_row
from ica_plugin.data.weights_file import read_weights
from ica_plugin.errors import ICAError
from runs import build, tokenised


class Loader(HoldoutLoader):
    """Of a host that gives what it is told to."""

    collator, limit = staticmethod(one_row), ("context_len", 10)

    def __init__(self, result, file=None):
        self.result, self.file = result, file

    def find(self, holdout):
        return Source(holdout, None, self.file)

    def read(self, source):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def explain(self, error, source):
        return f"give it another format ({error})"


def load(result, **settings):
    return Loader(result, **settings)(parse_config({"holdout": "good"}))


def rows(*lengths):
    return Dataset.from_list([{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [5] * n} for n in lengths])


def test_rows_come_with_their_name():
    name, read = load(rows(4, 10))
    assert name == "good" and read.lengths.tolist() == [[4], [10]]


def test_what_is_refused(tmp_path):
    for result, message in (
        (rows(4, 11, 3, 12), "ica.holdout: good: 2 row.s. are longer than context_len .10., first row 1 with 11 tokens"),
        (Dataset.from_list([]), "ica.holdout: good has no rows. Give at least one good example"),
        (rows(4).to_iterable_dataset(), "ica.holdout: good is streamed"),
        (rows(4).with_transform(lambda rows: rows), "ica.holdout: good makes its rows anew"),
        (KeyError("messages"), "ica.holdout: good: give it another format .'messages'."),
        (ICAError("ours"), "^ours$"),
        (Dataset.from_list([{"tokens": [1]}]), "ica.holdout: good: row 0: the trainer's batches have a layout"),
    ):
        with pytest.raises(ICAError, match=message):
            load(result)
    path = tmp_path / "good.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ICAError, match="ica.holdout: malformed json: .*good.jsonl, line 2"):
        load(KeyError("a"), file=path)


def test_what_a_path_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "good").mkdir()
    assert (
        local_path("~/good") == tmp_path / "good" and local_path("org/rows") is None and local_path("s3://bucket/a.json") is None
    )
    for text in ("~/nowhere", "nowhere.jsonl", "./nowhere"):
        with pytest.raises(ICAError, match=f"ica.holdout: {text}: no such file or folder .looked for /"):
            local_path(text)
    assert expanded(["~/a", {"train": "~/b"}, "c~", 3]) == [f"{tmp_path}/a", {"train": f"{tmp_path}/b"}, "c~", 3]


def test_a_home_is_expanded_in_holdout_and_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    holdout = tokenised(3, 9)
    tiny.write_jsonl(tmp_path / "good.jsonl", holdout.to_list())
    holdout.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    tiny.write_jsonl(tmp_path / "files" / "rows.jsonl", holdout.to_list())
    for given in (
        "~/good.jsonl",
        "~/saved",
        "~/files",
        {"path": "~/good.jsonl"},
        {"path": "json", "data_files": "~/good.jsonl"},
        {"path": "json", "data_files": ["~/good.jsonl"]},
    ):
        callback = attach(build(tmp_path, None), {"holdout": given})
        assert [row.sequences[0].tokens.tolist() for row in callback.holdout.examples] == holdout["input_ids"], given
    (tmp_path / "w.csv").write_text("row,weight\n0,1\n1,2\n")
    assert read_weights("~/w.csv", 2).tolist() == [1, 2]


def test_a_message_does_not_show_an_entry_s_token(tmp_path):
    with pytest.raises(ICAError) as error:
        attach(build(tmp_path, None), {"holdout": {"path": str(tmp_path / "nowhere.jsonl"), "token": "hf_s3cr3t"}})
    assert "nowhere.jsonl" in str(error.value) and "hf_s3cr3t" not in str(error.value)
