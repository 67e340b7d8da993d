"""One process and several: the same scores, and with the same global batch the same parameters."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from checks import callback_of, parameters
from processes import torchrun


def launch(folder: Path, processes: int, kind: str, rows: int, refresh: str, failing: int = -1) -> subprocess.CompletedProcess:
    return torchrun(__file__, processes, folder, kind, rows, refresh, failing, processes)


def scores(folder: Path) -> list[dict]:
    lines = pq.read_table(folder / "out" / "ica" / "scores.parquet").to_pylist()
    return sorted(lines, key=lambda line: (line["refresh"], line["row"]))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_two_processes_train_as_one(tmp_path, kind):
    """Global batch 4, 20 rows, 10 updates, refreshed every 3: 2 rows on each of two ranks, or two micro-batches on one."""
    for processes in (1, 2):
        done = launch(tmp_path / str(processes), processes, kind, 20, "3")
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (scores(tmp_path / str(n)) for n in (1, 2))
    assert [(line["refresh"], line["step"], line["row"]) for line in one] == [
        (line["refresh"], line["step"], line["row"]) for line in two
    ]
    for a, b in zip(one, two, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4) and a["weight"] == pytest.approx(b["weight"], abs=1e-4)
        assert a["demos"] == b["demos"]
    ends = [load_file(tmp_path / str(n) / "rank0.safetensors") for n in (1, 2)]
    start = load_file(tmp_path / "1" / "start.safetensors")
    assert max(float((ends[0][key] - start[key]).abs().max()) for key in start) > 1e-2
    assert max(float((ends[0][key] - ends[1][key]).abs().max()) for key in start) < 1e-5
    other = load_file(tmp_path / "2" / "rank1.safetensors")
    assert torch.equal(other["ica.weights"], ends[1]["ica.weights"])


@pytest.mark.parametrize("rows", [7, 2])
def test_three_processes_on_seven_rows_and_on_two(tmp_path, rows):
    """Unequal shares, a last incomplete batch, and more ranks than rows."""
    done = launch(tmp_path, 3, "sft", rows, "never")
    assert done.returncode == 0, done.stderr[-3000:]
    assert Counter(line["row"] for line in scores(tmp_path)) == {row: 1 for row in range(rows)}
    single = tmp_path / "single"
    assert launch(single, 1, "sft", rows, "never").returncode == 0
    for a, b in zip(scores(single), scores(tmp_path), strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4) and a["weight"] == pytest.approx(b["weight"], abs=1e-4)
    weights = [load_file(tmp_path / f"rank{rank}.safetensors")["ica.weights"] for rank in range(3)]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_a_rank_that_fails_while_scoring_ends_the_run_on_all_with_its_error(tmp_path):
    done = launch(tmp_path, 2, "sft", 8, "never", failing=1)
    assert done.returncode != 0
    assert "ICAError: scoring failed on rank 1: ValueError('broken on this rank')" in done.stderr


def main(folder: Path, kind: str, rows: int, refresh: str, failing: int, processes: int) -> None:
    import conftest  # noqa: F401
    import trl_harness

    make = trl_harness.sft_rows if kind == "sft" else trl_harness.pair_rows
    trainer = trl_harness.Maker(folder, kind, make(rows), optim="sgd", learning_rate=0.1, output_dir=str(folder / "out"))(
        ica={"k": 2, "refresh_interval": refresh if refresh == "never" else int(refresh)},
        accumulation=3 - min(processes, 2),
        num_train_epochs=2,
    )
    callback = callback_of(trainer)
    rank = trainer.accelerator.process_index
    if rank == failing:

        def broken(*args):
            raise ValueError("broken on this rank")

        callback.scoring.score = broken
    if rank == 0:
        folder.mkdir(exist_ok=True)
        save_file({name: value.contiguous() for name, value in parameters(trainer).items()}, folder / "start.safetensors")
    trainer.train()
    end = {**parameters(trainer), "ica.weights": callback.weights}
    save_file({name: value.contiguous() for name, value in end.items()}, folder / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
