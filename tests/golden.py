"""Golden runs: one small run per host whose scores, weights, demonstrations and trained parameters stay what they are.

A change of the code that means to change no result keeps them; `tests/golden/*.json` hold what the runs gave. They go through
what is public alone (`ica_plugin.attach`, the hosts' configs, scores.parquet, run.json, `trainer.model`), so they outlive any
layout of the package. Where a change of results is meant, `python tests/golden.py` in each environment (.venv first) writes those
that changed anew.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import Trainer

import ica_plugin

FOLDER = Path(__file__).with_suffix("")
WRITE = "WRITE_GOLDEN"  # in the environment: write what differs
# The largest differences that pass. On a CPU of the kind that wrote the files two runs are the same bit for bit, and so they were
# through all tested versions of torch and the hosts; other kinds round floats otherwise (seen: 1e-4 nats, 6e-5, 7e-6).
SAME_CPU = {
    "scores": 1e-5,  # nats
    "weights": 1e-6,
    "parameters": 1e-5,  # of a tensor's norm; of its root mean square for single elements
}
OTHER_CPU = {"scores": 1e-3, "weights": 5e-4, "parameters": 5e-5}
COUNTS = ("rows", "holdout_rows", "scored_rows", "refreshes", "steps")
LINE = ("refresh", "step", "row", "tokens", "demos", "base_logprob", "context_logprob", "score", "weight")
# A plain optimizer and no clipping: under Adam, or with clipped gradients, a constant scale of the weights divides out.
PLAIN = {"learning_rate": 0.02, "max_grad_norm": 1e9}


def block(**keys: Any) -> dict[str, Any]:
    """An `ica:` block that names every choice, so that it means the same whatever the defaults become."""
    named = {"score": "ica", "weighting": "softmax", "temperature": 1.0, "retrieval": "policy", "k": 2, "seed": 5, **keys}
    return {**({"apply": "gradient"} if "apply" in ica_plugin.ICAConfig.model_fields else {}), **named}


def cpu() -> str:
    """The kind of CPU, and the instructions that torch uses of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def record(trainer: Trainer) -> dict[str, Any]:
    """What a finished run left: its counts, every line of scores.parquet, and a summary of each trained tensor."""
    folder = Path(trainer.args.output_dir) / "ica"
    counts = json.loads((folder / "run.json").read_text())
    lines = sorted(pq.read_table(folder / "scores.parquet").to_pylist(), key=lambda line: (line["refresh"], line["row"]))
    return {
        "cpu": cpu(),
        "run": {name: counts[name] for name in COUNTS},
        "scores": [[line[name] for name in LINE] for line in lines],
        "parameters": {name: summary(tensor) for name, tensor in trainer.model.named_parameters() if tensor.requires_grad},
    }


def summary(tensor: torch.Tensor) -> list[float]:
    """Number of elements, sum, norm, a sum that tells places apart, and the first, middle and last element."""
    flat = tensor.detach().double().flatten()
    placed = flat @ torch.cos(torch.arange(len(flat), dtype=torch.float64))
    numbers = [flat.sum(), flat.norm(), placed, flat[0], flat[len(flat) // 2], flat[-1]]
    return [len(flat), *(float(number) for number in numbers)]


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest difference of each kind; what is counted, or named, must be equal."""
    assert found["run"] == expected["run"], (found["run"], expected["run"])
    known = LINE.index("base_logprob")
    assert [line[:known] for line in found["scores"]] == [line[:known] for line in expected["scores"]], "rows or demonstrations"
    assert found["parameters"].keys() == expected["parameters"].keys()
    worst = dict.fromkeys(SAME_CPU, 0.0)
    for ours, theirs in zip(found["scores"], expected["scores"], strict=True):
        *apart, weight = (abs(a - b) for a, b in zip(ours[known:], theirs[known:], strict=True))
        worst["scores"], worst["weights"] = max(worst["scores"], *apart), max(worst["weights"], weight)
    for name, numbers in expected["parameters"].items():
        size, norm = numbers[0], numbers[2]
        assert found["parameters"][name][0] == size, f"{name} has another size"
        scales = [norm] * 3 + [norm / size**0.5] * 3
        apart = [abs(a - b) / scale for a, b, scale in zip(found["parameters"][name][1:], numbers[1:], scales, strict=True)]
        worst["parameters"] = max(worst["parameters"], *apart)
    return worst


def check_golden(name: str, trainer: Trainer) -> None:
    """Train, and compare with tests/golden/{name}.json."""
    trainer.train()
    found, path = record(trainer), FOLDER / f"{name}.json"
    try:
        expected = json.loads(path.read_text())
        worst = differences(found, expected)
        print(name, "largest differences:", worst)
        limits = SAME_CPU if found["cpu"] == expected["cpu"] else OTHER_CPU
        beyond = [kind for kind, limit in limits.items() if not worst[kind] <= limit]
        assert not beyond, f"{name}: other {' and '.join(beyond)} than in {path}: {worst}. If that is meant, see {__file__}."
    except (AssertionError, FileNotFoundError):
        if not os.environ.get(WRITE):
            raise
        write(path, found)


def write(path: Path, found: dict[str, Any]) -> None:
    """As JSON with a row of scores or a tensor on each line, to ten digits."""

    def short(values: list[Any]) -> str:
        return json.dumps([float(f"{value:.10g}") if isinstance(value, float) else value for value in values])

    scores = ",\n".join(f"  {short(line)}" for line in found["scores"])
    tensors = ",\n".join(f"  {json.dumps(name)}: {short(numbers)}" for name, numbers in found["parameters"].items())
    path.parent.mkdir(exist_ok=True)
    head = f' "cpu": {json.dumps(found["cpu"])},\n "run": {json.dumps(found["run"])}'
    path.write_text(f'{{\n{head},\n "scores": [\n{scores}\n ],\n "parameters": {{\n{tensors}\n }}\n}}\n')


if __name__ == "__main__":
    import sys

    import pytest

    os.environ[WRITE] = "1"
    sys.exit(pytest.main(["-q", *map(str, sorted(Path(__file__).parent.rglob("test_golden*.py")))]))
