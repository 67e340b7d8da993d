"""`ica-plugin score` and `select` with Axolotl configs."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from axolotl.utils.schemas.datasets import SFTDataset
from typer.testing import CliRunner

import processes
import tiny
from harness import SFT, build, write_config
from ica_plugin.run.callback import ICACallback
from ica_plugin.tools.cli import app
from ica_plugin.tools.row_text import RowText

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    import axolotl.utils.data.rl
    import axolotl.utils.data.sft
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()
    for module in (axolotl.utils.data.sft, axolotl.utils.data.rl):
        monkeypatch.setattr(module, "save_preprocessed_dataset", lambda *args: None)


def run(*arguments) -> None:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output


def test_score_then_select(tmp_path, tiny_model):
    rows = tiny.sft_rows(12, seed=1)
    long = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green " * 400}]}
    config = write_config(tmp_path, tiny_model, "sft", [*rows[:5], long, *rows[5:]], tiny.sft_rows(6, seed=9), {"k": 2}, **LORA)
    out = tmp_path / "scores.parquet"
    run("score", config, "--out", out, "--score", "ica + likelihood")
    table = pq.read_table(out)
    assert table.column_names[-3:] == ["ica", "likelihood", "source"] and table.num_rows == 12
    assert not (tmp_path / "out" / "ica").exists()
    # Axolotl shuffles, and drops the long row: the source says where each row lies in the file.
    source = table["source"].to_numpy()
    assert sorted(source) == [0, 1, 2, 3, 4, *range(6, 13)] and list(source) != sorted(source)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    tokenizer = tiny.make_tokenizer()
    for place, tokens in zip(source, table["tokens"].to_pylist(), strict=True):
        answer = json.loads(lines[place])["messages"][-1]["content"]
        assert tokens - len(tokenizer(answer)["input_ids"]) in (1, 2)
    run("select", out, "--data", tmp_path / "train.jsonl", "--keep", "0.25", "--out", tmp_path / "best.jsonl")
    best = sorted(source[np.argsort(-table["score"].to_numpy())[:3]])
    assert (tmp_path / "best.jsonl").read_text().splitlines() == [lines[i] for i in best]


PARTS = {
    "shards": {"datasets": {"shards": 2, "shards_idx": 1}},
    "preprocess_shards": {"datasets": {"preprocess_shards": 3}},
    "dataset_shard_num": {"dataset_shard_num": 3, "dataset_shard_idx": 1},
    **({"weight": {"datasets": {"weight": 0.5}}} if "weight" in SFTDataset.model_fields else {}),  # Axolotl 0.21
}


@pytest.mark.parametrize("key", PARTS)
def test_a_part_of_the_data_is_selected_from_by_its_places_and_given_weights_are_refused(tmp_path, tiny_model, key):
    rows = tiny.sft_rows(12, seed=1)
    changes = {name: value for name, value in PARTS[key].items() if name != "datasets"}
    entry = {"path": str(tmp_path / "train.jsonl"), **SFT, **PARTS[key].get("datasets", {})}
    settings = {**LORA, **changes, "datasets": [entry], "shuffle_merged_datasets": False}
    config = write_config(tmp_path, tiny_model, "sft", rows, tiny.sft_rows(6, seed=9), {"k": 2}, **settings)
    out = tmp_path / "scores.parquet"
    run("score", config, "--out", out)
    table = pq.read_table(out)
    assert table.num_rows == {"shards": 6, "preprocess_shards": 12, "dataset_shard_num": 4, "weight": 6}[key]
    tokenizer, source = tiny.make_tokenizer(), table["source"].to_numpy()
    assert list(source) != list(range(len(source))) and len(set(source)) == len(source)
    for place, tokens in zip(source, table["tokens"].to_pylist(), strict=True):
        assert tokens - len(tokenizer(rows[place]["messages"][-1]["content"])["input_ids"]) in (1, 2)
    run("select", out, "--data", tmp_path / "train.jsonl", "--keep", "0.5", "--out", tmp_path / "best.jsonl")
    best = sorted(source[np.argsort(-table["score"].to_numpy())[: len(source) // 2]])
    assert [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()] == [rows[i] for i in best]
    # Weights that count the rows of the file are not the trainer's.
    (tmp_path / "w.csv").write_text("row,weight\n" + "".join(f"{row},1\n" for row in range(table.num_rows)))
    given = write_config(tmp_path, tiny_model, "sft", rows, rows[:2], {"weights": str(tmp_path / "w.csv")}, **settings)
    result = CliRunner().invoke(app, ["validate", str(given)])
    assert result.exit_code == 1 and f"{key}`" in result.output and "do not stand as in the data file" in result.output


def test_score_pairs_and_a_full_finetune(tmp_path, tiny_model):
    config = write_config(
        tmp_path, tiny_model, "dpo", tiny.pair_rows(8, seed=1), tiny.pair_rows(5, seed=9), {"k": 2, "score": "likelihood"}
    )
    run("score", config, "--out", tmp_path / "a.parquet")
    assert np.isfinite(pq.read_table(tmp_path / "a.parquet")["score"].to_numpy()).all()
    result = CliRunner().invoke(app, ["score", str(config), "--score", "influence"])
    assert result.exit_code == 1 and "trains the whole model" in result.output


@pytest.mark.host
def test_score_by_two_processes(tmp_path, tiny_model):
    config = write_config(tmp_path, tiny_model, "sft", tiny.sft_rows(9, seed=1), tiny.sft_rows(6, seed=9), {"k": 2})
    run("score", config, "--out", tmp_path / "one.parquet")
    launcher = ("accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "ica_plugin")
    done = processes.run(*launcher, "score", config, "--out", tmp_path / "two.parquet")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    np.testing.assert_allclose(one["score"].to_numpy(), two["score"].to_numpy(), atol=1e-4)
    assert one["demos"].to_pylist() == two["demos"].to_pylist() and one["source"].to_pylist() == two["source"].to_pylist()


def test_two_holdout_sets(tmp_path, tiny_model):
    config = write_config(tmp_path, tiny_model, "sft", tiny.sft_rows(8, seed=1), tiny.sft_rows(6, seed=9), {"k": 1})
    tiny.write_jsonl(tmp_path / "other.jsonl", tiny.sft_rows(4, seed=10))
    keys = yaml.safe_load(config.read_text())
    sets = [{"name": "a", "path": str(tmp_path / "holdout.jsonl")}, {"name": "b", "path": str(tmp_path / "other.jsonl")}]
    config.write_text(yaml.safe_dump({**keys, "ica": {"k": 1, "holdout": sets, "balance": "round_robin"}}))
    run("validate", config)
    run("score", config, "--out", tmp_path / "scores.parquet")
    table = pq.read_table(tmp_path / "scores.parquet")
    assert {"ica:a", "ica:b"} <= set(table.column_names)
    assert all(first < 6 <= second for first, second in table["demos"].to_pylist())


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_report_with_the_text_of_the_rows(tmp_path, tiny_model, kind):
    """The config's rows, read again by Axolotl, are those that were trained: shuffled, and without the one that is too long."""
    rows, holdout = (tiny.sft_rows, tiny.sft_rows) if kind == "sft" else (tiny.pair_rows, tiny.pair_rows)
    train = rows(10, seed=1)
    if kind == "sft":
        train.insert(4, {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green " * 400}]})
    config = write_config(tmp_path, tiny_model, kind, train, holdout(6, seed=9), {"k": 2}, **LORA)
    trainer = build(config)
    trainer.train()
    run("report", tmp_path / "out", "--config", config)
    page = (tmp_path / "out" / "ica" / "report.html").read_text()
    numbers = json.loads((tmp_path / "out" / "ica" / "report.json").read_text())
    tokens = [row["input_ids" if kind == "sft" else "chosen_ids"] for row in trainer.train_dataset]
    texts = [trainer.processing_class.decode(row) for row in tokens]
    assert len(numbers["rows"]) == 10 and len(set(texts)) == 10
    fresh = build(config)
    callback = next(one for one in fresh.callback_handler.callbacks if isinstance(one, ICACallback))
    assert all(texts[row] in RowText(callback).of_row(row, limit=10_000)["text"] for row in range(10))
    assert "demonstrations" in page and "Every row was trained" in page
    tiny.write_jsonl(tmp_path / "train.jsonl", train[::-1])
    result = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--config", str(config)])
    assert result.exit_code == 1 and "its rows are not those of the run" in result.output
