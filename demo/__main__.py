"""`python -m demo`: train a small real model with and without ICA on the CPU, and show what ICA did."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import torch
import transformers
import typer
import yaml
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import data, report
from .model import fetch_model

HERE = Path(__file__).parent
console = Console()
app = typer.Typer(add_completion=False)


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Show that a part runs, and then how many seconds it took."""
    start = time.perf_counter()
    with console.status(f"{part} …"):
        yield
    console.print(f"{part}: {time.perf_counter() - start:.0f} s")


def make_configs(model: str, out: Path) -> dict[str, dict[str, Any]]:
    """The Axolotl configs of both runs: config.yml, and config.yml with ica.yml, with this run's paths."""
    plain = yaml.safe_load((HERE / "config.yml").read_text()) | {
        "base_model": model,
        "lora_model_dir": str(out / "adapter"),
        "dataset_prepared_path": str(out / "prepared"),
        "output_dir": str(out / "plain"),
    }
    plain["datasets"][0]["path"] = str(out / "data" / "train.jsonl")
    ica = plain | yaml.safe_load((HERE / "ica.yml").read_text()) | {"output_dir": str(out / "ica")}
    ica["ica"]["holdout"] = str(out / "data" / "holdout.jsonl")
    return {"plain": plain, "ica": ica}


def make_adapter(model: str, config: dict[str, Any], folder: Path) -> None:
    """Save an untrained adapter (it changes nothing yet), so that both runs start from the same numbers."""
    torch.manual_seed(config["seed"])
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(r=config["lora_r"], lora_alpha=config["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(folder)


def axolotl_train(config: Path) -> None:
    """Run `axolotl train` in a process of its own; its output goes to a .log file next to the config."""
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # it looks for accelerate
        "CUDA_VISIBLE_DEVICES": "",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "WANDB_MODE": "disabled",
    }
    log = config.with_suffix(".log")
    with log.open("w") as file:
        finished = subprocess.run(["axolotl", "train", str(config)], env=environment, stdout=file, stderr=subprocess.STDOUT)
    if finished.returncode:
        console.print("".join(log.read_text().splitlines(keepends=True)[-40:]), markup=False, highlight=False)
        raise SystemExit(f"axolotl train {config} failed; its whole output is in {log}")


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Hub id or folder of the model; without it, SmolLM2-135M-Instruct from PyPI.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = HERE / "build",
) -> None:
    """Train twice on the same mixture, plain and with ICA, then print which rows were trained how often, and the test losses."""
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    for stale in ("data", "adapter", "prepared", "plain", "ica"):
        shutil.rmtree(out / stale, ignore_errors=True)

    with timed("model"):
        model = model or str(fetch_model(out / "model"))
        if Path(model).is_dir():
            os.environ["HF_HUB_OFFLINE"] = "1"  # for the training processes: nothing is fetched from here on

    with timed("data and adapter"):
        splits = data.make_splits()
        for name, rows in vars(splits).items():
            data.write_jsonl(out / "data" / f"{name}.jsonl", rows)
        configs = make_configs(model, out)
        make_adapter(model, configs["plain"], out / "adapter")

    for name, config in configs.items():
        path = out / f"{name}.yml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        with timed(f"axolotl train {path.name}"):
            axolotl_train(path)

    with timed("evaluation"):
        adapters = {"before training": out / "adapter", "plain": out / "plain", "ica": out / "ica"}
        losses = report.test_losses(model, adapters, splits.test)

    scores = pq.read_table(out / "ica" / "ica" / "scores.parquet")
    (prepared,) = (out / "prepared").glob("*/dataset_info.json")
    kinds = report.match_kinds(load_from_disk(prepared.parent), scores, splits.train, AutoTokenizer.from_pretrained(model))
    draws = report.draws_by_kind(scores, kinds)
    report.plot_draws(draws, out / "draws.png")

    run = json.loads((out / "ica" / "ica" / "run.json").read_text())
    console.print(f"all: {time.perf_counter() - start:.0f} s, of which ICA scoring: {run['scoring_seconds']:.0f} s\n")
    console.print(report.draws_table(draws), report.losses_table(losses), sep="\n")
    console.print(f"The same as a picture: {out / 'draws.png'}")


if __name__ == "__main__":
    app()
