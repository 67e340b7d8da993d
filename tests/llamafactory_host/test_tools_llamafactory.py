"""`ica-plugin score` with a LLaMA-Factory config."""

import numpy as np
import pyarrow.parquet as pq
import yaml
from typer.testing import CliRunner

import tiny
from ica_plugin.cli import app
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
