"""`ica-plugin score` with a LLaMA-Factory config."""

import numpy as np
import pyarrow.parquet as pq
import yaml
from typer.testing import CliRunner

import tiny
from ica_plugin.tools.cli import app
from llamafactory_harness import LORA, run_args, write_data


def test_score(tmp_path, tiny_model):
    write_data(tmp_path, "sft", tiny.sft_rows(9, seed=1), tiny.sft_rows(6, seed=9))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**run_args(tmp_path, tiny_model, "sft", **LORA), "ica": {"holdout": "good", "k": 2}}))
    out = tmp_path / "scores.parquet"
    result = CliRunner().invoke(app, ["score", str(config), "--out", str(out), "--score", "ica + rho"])
    assert result.exit_code == 0, result.output
    table = pq.read_table(out)
    assert table["row"].to_pylist() == list(range(9)) and np.isfinite(table["rho"].to_numpy()).all()
    assert not (tmp_path / "out").exists()


def test_select_refuses_rows_that_packing_moved(tmp_path, tiny_model):
    rows = tiny.sft_rows(9, seed=1)
    write_data(tmp_path, "sft", rows, tiny.sft_rows(6, seed=9))
    keys = run_args(tmp_path, tiny_model, "sft", **LORA) | {"neat_packing": True, "ica": {"holdout": "good", "k": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys))
    out, data = tmp_path / "scores.parquet", tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    result = CliRunner().invoke(app, ["score", str(tmp_path / "config.yaml"), "--out", str(out)])
    assert result.exit_code == 0 and pq.read_table(out).num_rows == 9, result.output
    result = CliRunner().invoke(app, ["select", str(out), "--data", str(data), "--out", str(tmp_path / "best.jsonl")])
    assert result.exit_code == 1 and "`neat_packing: True` puts them elsewhere" in result.output
