"""`ica-llamafactory` as a user runs it, by subprocess, on a tiny model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

import tiny
from checks import callback_of
from llamafactory_harness import ROWS, Maker, dataset_entry, run_args, write_data
from processes import run

pytestmark = pytest.mark.host
EXAMPLES = Path(__file__).parents[3] / "example_configs" / "llamafactory"


def command(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run a command of this environment."""
    done = run(*arguments, **environment)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def write_config(folder: Path, model: Path, kind: str, rows: list[dict], ica: dict | None, **settings) -> Path:
    write_data(folder, kind, rows, ROWS.get(kind, tiny.pair_rows)(6, seed=99))
    args = run_args(folder, model, kind, **settings)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(args if ica is None else {**args, "ica": ica}))
    return path


def scores(out: Path) -> dict[int, dict]:
    lines = pq.read_table(out / "ica" / "scores.parquet").to_pylist()
    last = max(line["refresh"] for line in lines)
    return {line["row"]: line for line in lines if line["refresh"] == last}


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_example_configs(tmp_path, model_for_4_bit, example):
    """Every example as it stands (QLoRA in 4 bit, neat packing, DPO, SimPO, KTO), with overrides for a CPU and small data."""
    config = yaml.safe_load((EXAMPLES / example).read_text())
    kind = config["pref_loss"] if config["stage"] == "dpo" else config["stage"]
    make = ROWS.get(kind, tiny.pair_rows)
    write_data(tmp_path, kind, make(24), make(6, seed=5))
    info = {config["dataset"]: dataset_entry(kind, "train.jsonl"), config["ica"]["holdout"]: dataset_entry(kind, "holdout.jsonl")}
    overrides = {
        "model_name_or_path": model_for_4_bit,
        "dataset_dir": tmp_path,
        "output_dir": tmp_path / "out",
        "template": "chatml",
        "cutoff_len": 128,
        "bf16": "false",
        "use_cpu": "true",
        "flash_attn": "sdpa",
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "ica.k": 2,
    }
    if config["ica"]["holdout"].endswith(".jsonl"):
        info.popitem()
        overrides["ica.holdout"] = tmp_path / "holdout.jsonl"
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    done = command("ica-llamafactory", "train", str(EXAMPLES / example), *(f"{key}={value}" for key, value in overrides.items()))
    assert "refresh 0 at step 0" in done.stderr and "ica/effective_sample_size" in done.stdout + done.stderr
    lines = pq.read_table(tmp_path / "out" / "ica" / "scores.parquet").to_pylist()
    assert {line["row"] for line in lines} == set(range(24))
    assert all(np.isfinite(line["score"]) and len(line["demos"]) == 2 for line in lines)
    run = json.loads((tmp_path / "out" / "ica" / "run.json").read_text())
    assert run["rows"] == 24 and run["config"]["k"] == 2 and run["versions"]["llamafactory"]
    assert run["length_normalize"] == (kind in ("simpo", "sigmoid"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_two_processes_started_by_the_launcher_score_as_one(tmp_path, tiny_model):
    """Unequal shares: 13 rows on 2 ranks."""
    rows = tiny.sft_rows(13, turns=2)
    config = write_config(tmp_path, tiny_model, "sft", rows, {"holdout": "good", **tiny.NAMED})
    done = command("ica-llamafactory", "train", str(config), FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert "Initializing 2 distributed tasks" in done.stdout + done.stderr
    two = scores(tmp_path / "out")
    trainer = Maker(tmp_path / "one", tiny_model, "sft", rows)(ica={})
    trainer.train()
    one = scores(callback_of(trainer).files.folder.parent)
    assert sorted(one) == sorted(two) == list(range(13))
    for row in one:
        assert one[row]["score"] == pytest.approx(two[row]["score"], abs=1e-4)
        assert one[row]["weight"] == pytest.approx(two[row]["weight"], abs=1e-4)


def test_torchrun_on_the_module(tmp_path, tiny_model):
    config = write_config(tmp_path, tiny_model, "sigmoid", tiny.pair_rows(8), {"holdout": "good"}, max_steps=1)
    command(
        "torchrun",
        "--nproc_per_node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        "ica_plugin.hosts.llamafactory",
        "train",
        str(config),
    )
    assert sorted(scores(tmp_path / "out")) == list(range(8))


def test_without_the_block_it_is_llamafactory_cli(tmp_path, tiny_model):
    ends = []
    for name in ("ica-llamafactory", "llamafactory-cli"):
        config = write_config(tmp_path / name, tiny_model, "sft", tiny.sft_rows(8), None, max_steps=3)
        command(name, "train", str(config))
        ends.append(load_file(tmp_path / name / "out" / "model.safetensors"))
        assert not (tmp_path / name / "out" / "ica").exists()
    start = load_file(tiny_model / "model.safetensors")
    assert any(not (start[key] == ends[0][key]).all() for key in start)
    assert ends[0].keys() == ends[1].keys() and all((ends[0][key] == ends[1][key]).all() for key in ends[0])
    assert command("ica-llamafactory", "version").stdout == command("llamafactory-cli", "version").stdout


def test_a_wrong_block_ends_with_one_line(tmp_path, tiny_model):
    config = write_config(tmp_path, tiny_model, "sft", tiny.sft_rows(4), {"holdout": "good", "kk": 3})
    done = command("ica-llamafactory", "train", str(config), check=False)
    assert done.returncode != 0 and "did you mean `k`" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["sft", "simpo", "kto"])
def test_validate(tmp_path, tiny_model, kind):
    rows = ROWS.get(kind, tiny.pair_rows)(8)
    config = write_config(tmp_path, tiny_model, kind, rows, {"holdout": "good"})
    config.write_text(config.read_text() + f"tokenized_path: {tmp_path / 'tokenised'}\n")
    before = set(tmp_path.rglob("*"))
    done = command("ica-plugin", "validate", str(config), COLUMNS="150")
    assert "ready to train" in done.stdout and "6 (good)" in done.stdout
    assert set(tmp_path.rglob("*")) == before, "nothing is left on disk"
    assert len(done.stdout.splitlines()) < 20, "the verdict, without what the host prints"
    config.write_text(config.read_text().replace("holdout: good", "holdout: god"))
    done = command("ica-plugin", "validate", str(config), check=False)
    assert done.returncode == 1 and "Did you mean `good`" in done.stderr and "Traceback" not in done.stderr
