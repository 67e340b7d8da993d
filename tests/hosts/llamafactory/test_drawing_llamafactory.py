"""`apply: sample` in LLaMA-Factory's own trainers."""

from __future__ import annotations

import pytest

import tiny
from draw_checks import check_draws, check_equal_weights, check_resumed
from ica_plugin.errors import ICAError
from llamafactory_harness import Maker, kto_rows

ROWS = {"sft": tiny.sft_rows, "kto": kto_rows}


@pytest.fixture
def make(tmp_path, tiny_model):
    return lambda kind, n=15, **settings: Maker(tmp_path, tiny_model, kind, ROWS.get(kind, tiny.pair_rows)(n), **settings)


@pytest.mark.parametrize("kind", ["sft", "sigmoid", "kto"])
def test_equal_weights_are_the_host_s_own_run(make, tmp_path, kind):
    check_equal_weights(make(kind), tmp_path, num_train_epochs=2)


@pytest.mark.parametrize("kind, settings", [("sft", {}), ("sigmoid", {"disable_shuffling": True}), ("simpo", {}), ("kto", {})])
def test_rows_are_trained_as_often_as_the_file_says(make, tmp_path, kind, settings):
    check_draws(make(kind, **settings), tmp_path, num_train_epochs=2, accumulation=2)


def test_resumed_from_any_checkpoint_it_ends_the_same(make, tmp_path):
    check_resumed(make("sft", 9), tmp_path, lambda n: {"apply": "sample", "refresh_interval": 3, "k": 2}, 2, num_train_epochs=2)


@pytest.mark.parametrize("packing", ["packing", "neat_packing"])
def test_packed_rows_cannot_be_drawn(make, packing):
    with pytest.raises(ICAError, match="rows were packed before the trainer was built"):
        make("sft", 40, **{packing: True}, cutoff_len=64)(ica={"apply": "sample"})
