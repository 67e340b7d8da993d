"""Whatever the data, sampler, packing, accumulation and refresh: every training forward uses each row's newest weight."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

import tiny
from ica_plugin import attach
from ica_plugin.data.row_ids import ROW_IDS
from ica_plugin.training.injection import GradientInjection
from runs import build, tokenised

BLOCKS = st.fixed_dictionaries(
    {
        "refresh_interval": st.sampled_from(["never", "epoch", 1, 2, 3, 7, 0.25]),
        "refresh_scope": st.sampled_from(["window", "all"]),
        "weighting": st.sampled_from(["softmax", "minmax", "rank", "top", "band"]),
        "k": st.integers(1, 4),
        "retrieval": st.sampled_from(["random", "policy", "bm25"]),
        "max_weight": st.sampled_from([1.5, 3.0, 10.0]),
    }
)
RUNS = st.fixed_dictionaries(
    {
        "per_device_train_batch_size": st.integers(1, 4),
        "gradient_accumulation_steps": st.integers(1, 3),
        "num_train_epochs": st.integers(1, 2),
        "max_steps": st.sampled_from([-1, -1, 3, 9]),
        "dataloader_drop_last": st.booleans(),
        "train_sampling_strategy": st.sampled_from(["random", "sequential", "group_by_length"]),
        "seed": st.integers(0, 5),
    }
)


@st.composite
def data_sets(draw) -> list[dict]:
    """5 to 14 rows of 4 to 14 tokens, each with at least one supervised token that has a predecessor."""
    rows = []
    for _ in range(draw(st.integers(5, 14))):
        tokens = draw(st.lists(st.integers(3, 400), min_size=4, max_size=14))
        supervised = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
        supervised[-1] = True
        labels = [token if keep else -100 for token, keep in zip(tokens, supervised, strict=True)]
        rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels})
    return rows


@pytest.mark.slow
@given(rows=data_sets(), block=BLOCKS, run=RUNS, packed=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_every_forward_uses_the_newest_weights(rows, block, run, packed):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = build(folder, None, train=Dataset.from_list(rows), **run)
        if packed:  # rows of a batch one after the other in one line
            trainer.data_collator = DataCollatorWithFlattening(return_position_ids=True)
        attach(trainer, tiny.NAMED | block, holdout=tokenised(5, 9))
        with spy(trainer) as used:
            trainer.train()
        assert used

        newest: dict[int, dict[int, float]] = defaultdict(dict)  # row → step → weight
        by_refresh = defaultdict(list)
        for line in pq.read_table(folder / "ica" / "scores.parquet").to_pylist():
            newest[line["row"]][line["step"]] = line["weight"]
            by_refresh[line["refresh"]].append((line["weight"], line["tokens"]))
        for step, row_ids, weights in used:
            assert (row_ids >= 0).any()
            for row in row_ids[row_ids >= 0].unique().tolist():
                scored_at = max(at for at in newest[row] if at <= step)
                assert (weights[row_ids == row] == np.float32(newest[row][scored_at])).all()
            assert (weights[row_ids < 0] == 0).all()
        for lines in by_refresh.values():
            weights, tokens = np.array(lines).T
            assert abs(np.average(weights, weights=tokens) - 1) < 1e-5


@contextmanager
def spy(trainer) -> Iterator[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """Collects (step, row ids of the batch, weights that scaled its gradient) of every training forward."""
    used, ids = [], []
    host_loss, host_scaling = trainer.compute_loss, GradientInjection.scaling

    def loss(model, inputs, *args, **kwargs):
        ids.append(inputs[ROW_IDS].clone())
        return host_loss(model, inputs, *args, **kwargs)

    @contextmanager
    def scaling(injection, weights):
        with host_scaling(injection, weights):
            yield
        used.append((trainer.state.global_step, ids.pop(), weights.clone()))

    trainer.compute_loss = loss
    with mock.patch.object(GradientInjection, "scaling", scaling):
        yield used
