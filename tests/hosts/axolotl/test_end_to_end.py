"""`axolotl train` as a user runs it, by subprocess, on a tiny model."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from harness import write_config
from processes import run

pytestmark = pytest.mark.host
EXAMPLES = Path(__file__).parents[3] / "example_configs" / "axolotl"


def axolotl(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return run("axolotl", *arguments, **variables)


def train(config: Path) -> subprocess.CompletedProcess:
    done = axolotl("train", str(config))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def scores(config: Path) -> list[dict]:
    out = Path(yaml.safe_load(config.read_text())["output_dir"])
    return pq.read_table(out / "ica" / "scores.parquet").to_pylist()


def check_outputs(config: Path, done: subprocess.CompletedProcess, rows: int, refreshes: int, by_token: bool) -> None:
    table = scores(config)
    assert sorted({line["refresh"] for line in table}) == list(range(refreshes))
    for refresh in range(refreshes):
        lines = [line for line in table if line["refresh"] == refresh]
        assert sorted(line["row"] for line in lines) == list(range(rows)), "every row once per refresh"
        share = np.array([line["tokens"] if by_token else 1 for line in lines], float)
        weights = np.array([line["weight"] for line in lines])
        assert (weights * share).sum() / share.sum() == pytest.approx(1, abs=1e-5)
        assert weights.std() > 0.05
        for line in lines:
            assert line["score"] == pytest.approx(line["context_logprob"] - line["base_logprob"], abs=1e-6)
            assert len(line["demos"]) == 3
    assert f"refresh {refreshes - 1} at step" in done.stderr
    assert "ica/effective_sample_size" in done.stdout + done.stderr
    run = json.loads((Path(yaml.safe_load(config.read_text())["output_dir"]) / "ica" / "run.json").read_text())
    assert run["rows"] == rows and run["refreshes"] == refreshes and run["scored_rows"] == rows * refreshes
    assert run["scoring_seconds"] > 0 and run["training_seconds"] > 0 and "axolotl" in run["versions"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sft", {}),
        ("sft", {"sample_packing": True, "pad_to_sequence_len": True}),
        ("dpo", {}),
        ("simpo", {"gradient_accumulation_steps": 2}),
    ],
    ids=["sft", "packed-sft", "dpo", "simpo"],
)
def test_train(tmp_path, tiny_model, kind, settings):
    rows = tiny.sft_rows(24, turns=2) if kind == "sft" else tiny.pair_rows(16)
    holdout = tiny.sft_rows(6, seed=9) if kind == "sft" else tiny.pair_rows(6, seed=9)
    config = write_config(tmp_path, tiny_model, kind, rows, holdout, {"refresh_interval": "epoch"}, num_epochs=2, **settings)
    check_outputs(config, train(config), len(rows), refreshes=2, by_token=kind == "sft")


def test_qlora_in_4_bit(tmp_path, model_for_4_bit):
    rows = tiny.sft_rows(16, turns=2)
    config = write_config(
        tmp_path,
        model_for_4_bit,
        "sft",
        rows,
        tiny.sft_rows(6, seed=9),
        {},
        adapter="qlora",
        load_in_4bit=True,
        lora_r=4,
        lora_alpha=8,
        lora_target_modules=["q_proj", "v_proj", "down_proj"],
        micro_batch_size=1,
        gradient_checkpointing=True,
    )
    check_outputs(config, train(config), len(rows), refreshes=1, by_token=True)


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a CUDA build of torch without a GPU: Axolotl asks the driver before it starts several processes",
)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_two_processes_train_as_one(tmp_path, tiny_model, kind):
    """Global batch 4, 20 rows, 10 updates, refreshed every 4: 2 rows on each of two ranks, or two micro-batches on one."""
    rows, holdout = (
        make(20 - 14 * i, seed=9 * i) for i, make in enumerate([tiny.sft_rows if kind == "sft" else tiny.pair_rows] * 2)
    )
    configs = {
        processes: write_config(
            tmp_path / str(processes),
            tiny_model,
            kind,
            rows,
            holdout,
            {"refresh_interval": 4},
            shuffle_merged_datasets=False,
            gradient_accumulation_steps=3 - processes,
            num_epochs=2,
            optimizer="sgd",
            learning_rate=0.1,
            max_memory={"cpu": "8GiB"},  # several processes without a GPU: Axolotl would place the model on one
        )
        for processes in (1, 2)
    }
    train(configs[1])
    done = axolotl("train", str(configs[2]), "--launcher", "torchrun", "--", "--nproc_per_node=2", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = ({(line["refresh"], line["row"]): line for line in scores(configs[n])} for n in (1, 2))
    assert one.keys() == two.keys() and len(one) == 40
    for key in one:
        assert one[key]["score"] == pytest.approx(two[key]["score"], abs=1e-4)
        assert one[key]["weight"] == pytest.approx(two[key]["weight"], abs=1e-4)
    start = load_file(tiny_model / "model.safetensors")
    ends = [load_file(tmp_path / str(n) / "out" / "model.safetensors") for n in (1, 2)]
    assert max(float((ends[0][key] - start[key]).abs().max()) for key in start) > 1e-2
    assert max(float((ends[0][key] - ends[1][key]).abs().max()) for key in start) < 1e-5


# Text fields of each example's data set, for rows that a tiny tokenizer can read.
EXAMPLE_ROWS = {"sft": tiny.sft_rows, "dpo": tiny.pair_rows, "simpo": tiny.pair_rows}


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.yml")))
def test_example_configs(tmp_path, model_for_4_bit, example):
    """Every example as it stands, with a tiny model, small data, and what a CPU lacks switched off."""
    config = yaml.safe_load((EXAMPLES / example).read_text())
    make = EXAMPLE_ROWS[config.get("rl", "sft")]
    tiny.write_jsonl(tmp_path / "train.jsonl", make(24))
    tiny.write_jsonl(tmp_path / "holdout.jsonl", make(6, seed=5))
    config["base_model"] = str(model_for_4_bit)
    if "special_tokens" in config:  # they are the real model's
        config["special_tokens"] = {"pad_token": "<|endoftext|>"}
    config["datasets"][0]["path"] = str(tmp_path / "train.jsonl")
    config["datasets"][0].pop("split", None)
    holdout = config["ica"]["holdout"]
    if isinstance(holdout, dict):
        holdout.update(path=str(tmp_path / "holdout.jsonl"))
    else:
        config["ica"]["holdout"] = str(tmp_path / "holdout.jsonl")
    config.update(
        output_dir=str(tmp_path / "out"),
        dataset_prepared_path=str(tmp_path / "prepared"),
        sequence_len=256,
        num_epochs=1,
        bf16=False,
        attn_implementation="sdpa",
        optimizer="adamw_torch",
        lora_qkv_kernel=False,
        lora_o_kernel=False,
        lora_mlp_kernel=False,
        tf32=False,
        wandb_project=None,
        gradient_accumulation_steps=1,
        val_set_size=0,
    )
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    train(path)
    table = scores(path)
    rows = {line["row"] for line in table}
    assert rows <= set(range(24))
    # Axolotl estimates how many steps packed rows take, and may leave a few out, which are then not scored either.
    assert len(rows) == 24 or (config.get("sample_packing") and len(rows) >= 18)
    assert np.isfinite([line["score"] for line in table]).all()
