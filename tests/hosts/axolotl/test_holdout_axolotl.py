"""The holdout through Axolotl's own loaders: every local format, and a full entry."""

import json
import random

import datasets
import pytest

import tiny
from harness import load_config, write_config
from ica_plugin.hosts.axolotl.args import config_of
from ica_plugin.hosts.axolotl.holdout import load_holdout
from leaks import check_no_leak, entry_with_every_key

RNG = random.Random(0)
ROWS = [{"instruction": tiny.sentence(RNG), "input": "", "output": tiny.sentence(RNG)} for _ in range(5)]


def write(folder, ending):
    path = folder / f"good{ending}"
    table = datasets.Dataset.from_list(ROWS)
    if ending == ".json":
        path.write_text(json.dumps(ROWS))
    elif ending == ".jsonl":
        tiny.write_jsonl(path, ROWS)
    elif ending == ".csv":
        table.to_csv(path)
    elif ending == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    return path


@pytest.fixture
def load(tmp_path, tiny_model, tokenizer):
    def run(holdout, **settings):
        path = write_config(tmp_path, tiny_model, "sft", tiny.sft_rows(4), [], {"holdout": holdout}, **settings)
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        cfg = load_config(path)
        return load_holdout(cfg, config_of(cfg), tokenizer)[1].to_list()

    return run


ALPACA = {"type": "alpaca"}


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet", ""])
def test_local_formats(load, tmp_path, ending):
    train = [{"path": str(tmp_path / "train.jsonl"), **ALPACA}]
    rows = load(str(write(tmp_path, ending)), datasets=train)
    assert len(rows) == 5
    assert [sum(label != -100 for label in row["labels"]) > 0 for row in rows] == [True] * 5
    assert rows == load(str(write(tmp_path, ".jsonl")), datasets=train)


def test_an_entry_with_a_type_of_its_own(load, tmp_path):
    """Chats to train on, Alpaca rows as holdout."""
    rows = load({"path": str(write(tmp_path, ".jsonl")), **ALPACA})
    assert len(rows) == 5


def test_an_entry_without_a_type_is_read_as_the_first_dataset(load, tmp_path):
    train = [{"path": str(tmp_path / "train.jsonl"), **ALPACA}]
    path = str(write(tmp_path, ".jsonl"))
    assert load({"path": path, "split": "train[:3]"}, datasets=train) == load(path, datasets=train)[:3]


def test_a_home_is_expanded(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train = [{"path": str(tmp_path / "train.jsonl"), **ALPACA}]
    path = write(tmp_path, ".jsonl")
    assert (
        load("~/good.jsonl", datasets=train) == load({"path": "~/good.jsonl"}, datasets=train) == load(str(path), datasets=train)
    )


def test_no_key_of_an_entry_leaks():
    from axolotl.utils.schemas import datasets as schemas

    models = (schemas.SFTDataset, schemas.DPODataset, schemas.KTODataset, schemas.StepwiseSupervisedDataset)
    keys = {key for model in models for key in model.model_fields}
    assert len(keys) > 20 and {"path", "split", "type"} <= check_no_leak(entry_with_every_key(sorted(keys))).keys()
