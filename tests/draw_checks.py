"""`apply: sample` in every host's own trainers: the same test bodies for all of them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from checks import MakeTrainer, callback_of, parameters, write_weights
from ica_plugin.data.read import without_text_columns
from ica_plugin.data.row_ids import ROW_IDS

# Scored, and all weighted 1.
ONES = {"weighting": "top", "keep": 1.0, "apply": "sample"}


def given(folder: Path, weights: Callable[[int], np.ndarray], **more: Any) -> Callable[[int], dict]:
    folder.mkdir(parents=True, exist_ok=True)
    return lambda n: {"apply": "sample", "weights": str(write_weights(folder / "weights.parquet", weights(n))), **more}


def uneven(n: int) -> np.ndarray:
    return np.random.default_rng(0).gamma(1.0, 1.0, n)


def record(trainer: Any) -> list[tuple[int, list[int]]]:
    """Fills with (global step, rows) of every training batch, where it enters the loss; checks that tokens are the rows' own."""
    found: list[tuple[int, list[int]]] = []
    dataset = without_text_columns(trainer.train_dataset)
    lengths = [len(row["input_ids"]) if "input_ids" in row else 0 for row in dataset]
    host_loss = trainer.compute_loss

    def loss(model, inputs, *args, **kwargs):
        ids = inputs.get(ROW_IDS)
        if model.training and ids is not None:
            if ids.dim() == 1:
                rows = ids.tolist()
                if "input_ids" in inputs and lengths[0] and len(inputs["input_ids"]) == len(rows):
                    for row, tokens in zip(rows, inputs["input_ids"].tolist(), strict=True):
                        own = dataset[row]["input_ids"]
                        assert own == tokens[: len(own)] or own == tokens[-len(own) :]
            else:
                rows = []
                for line, tokens in zip(ids.tolist(), inputs["input_ids"].tolist(), strict=True):
                    at = 0
                    while at < len(line) and line[at] >= 0:
                        rows.append(line[at])
                        assert tokens[at : at + lengths[line[at]]] == dataset[line[at]]["input_ids"]
                        assert line[at : at + lengths[line[at]]] == [line[at]] * lengths[line[at]]
                        at += lengths[line[at]]
            found.append((trainer.state.global_step, rows))
        return host_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = loss
    return found


def table(trainer: Any) -> dict[str, list]:
    return pq.read_table(Path(trainer.args.output_dir) / "ica" / "scores.parquet").to_pydict()


def check_equal_weights(make_trainer: MakeTrainer, tmp_path: Path, **settings: Any) -> None:
    """Rows drawn by equal weights are the host's own run, bit for bit."""
    blocks = {
        "plain": None,
        "given": given(tmp_path, np.ones),
        "scored": lambda n: {**ONES, "refresh_interval": "epoch"},
        "windows": lambda n: {**ONES, "refresh_interval": 2, "candidates": 1},
        "rest": lambda n: {**ONES, "refresh_interval": 2, "refresh_scope": "all"},
    }
    ends, start = {}, None
    for name, block in blocks.items():
        trainer = make_trainer(ica=block, **settings)
        if start is None:
            start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.model.load_state_dict(start)
        trainer.train()
        ends[name] = parameters(trainer)
    assert any(not torch.equal(start[key], value) for key, value in ends["plain"].items())
    for name in blocks:
        for key, value in ends["plain"].items():
            assert torch.equal(value, ends[name][key]), (name, key)


def check_draws(make_trainer: MakeTrainer, tmp_path: Path, *, same_steps: bool = True, **settings: Any) -> dict[str, list]:
    """The rows that enter the loss are as many as `draws` says, in every epoch and window; the host's steps stay its own.

    Args:
        same_steps: the host's epochs are as long as it counted beforehand, which packed ones need not be.

    Returns:
        (global step, rows) of each batch, by block.
    """
    blocks = {
        "host": given(tmp_path / "ones", np.ones),
        "given": given(tmp_path / "given", uneven),
        "windows": lambda n: {"apply": "sample", "weighting": "rank", "refresh_interval": 2},
    }
    trained = {}
    for name, block in blocks.items():
        trainer = make_trainer(ica=block, **settings)
        trained[name] = record(trainer)
        trainer.train()
        found = table(trainer)
        counts = Counter(row for _, rows in trained[name] for row in rows)
        draws: Counter = Counter()
        for row, times in zip(found["row"], found["draws"], strict=True):
            draws[row] += times
        assert +draws == counts, name
        if same_steps:
            assert Counter(step for step, _ in trained[name]) == Counter(step for step, _ in trained["host"]), name
        assert trainer.state.global_step == trainer.state.max_steps
        if name == "windows":
            windows = sorted(set(zip(found["refresh"], found["step"], strict=True)))
            assert len(windows) >= 2
            for (refresh, step), (_, until) in zip(windows, [*windows[1:], (0, 10**9)], strict=True):
                of_window = Counter(row for at, rows in trained[name] if step <= at < until for row in rows)
                said = {
                    row: n for row, at, n in zip(found["row"], found["refresh"], found["draws"], strict=True) if at == refresh
                }
                assert +Counter(said) == of_window
                assert len(said) > len(of_window)
    assert max(Counter(row for _, rows in trained["given"] for row in rows).values()) > 2
    return trained


def check_resumed(make_trainer: MakeTrainer, tmp_path: Path, block: Any, every: int = 1, **settings: Any) -> None:
    """Stopped after any step and resumed it trains the same rows, to the same parameters."""
    settings |= {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(ica=block, **settings)
    start = {key: value.clone() for key, value in whole.model.state_dict().items()}
    rows = record(whole)
    whole.train()
    assert whole.state.max_steps > 4
    for step in range(1, whole.state.max_steps, every):
        resumed = make_trainer(ica=block, **settings)
        resumed.model.load_state_dict(start)
        checkpoint = Path(whole.args.output_dir) / f"checkpoint-{step}"
        shutil.copytree(Path(whole.args.output_dir) / "ica", Path(resumed.args.output_dir) / "ica", dirs_exist_ok=True)
        again = record(resumed)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert again == [one for one in rows if one[0] >= step], step
        for key, value in parameters(whole).items():
            assert torch.equal(value, parameters(resumed)[key]), (step, key)
        assert table(resumed) == table(whole)
        assert callback_of(resumed).state.counts.refreshes == callback_of(whole).state.counts.refreshes
