"""`apply: sample` in Axolotl's own trainers, packed and not."""

from __future__ import annotations

import numpy as np
import pytest

import tiny
from checks import callback_of
from draw_checks import check_draws, check_equal_weights, check_resumed, given, record, table, uneven
from harness import maker  # noqa: F401
from ica_plugin.data.scores import read_scores

PACKED = {"sample_packing": True, "pad_to_sequence_len": True, "sequence_len": 64}
KINDS = {
    "sft": ("sft", {}),
    "packed": ("sft", PACKED),
    "in order": ("sft", {**PACKED, "sample_packing_sequentially": True, "curriculum_sampling": True}),
    "real batches": ("sft", {**PACKED, "multipack_real_batches": True}),
    "dpo": ("dpo", {}),
}


@pytest.fixture
def make(maker):  # noqa: F811
    def one(name: str, n: int = 25, **settings):
        kind, own = KINDS[name]
        return maker(kind, (tiny.sft_rows if kind == "sft" else tiny.pair_rows)(n), **{**own, **settings})

    return one


@pytest.mark.parametrize("name", ["sft", "packed", "in order", "dpo"])
def test_equal_weights_are_the_host_s_own_run(make, tmp_path, name):
    check_equal_weights(make(name), tmp_path, num_epochs=2)


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_trained_as_often_as_the_file_says(make, tmp_path, name):
    packed = name not in ("sft", "dpo")
    trained = check_draws(make(name), tmp_path, num_epochs=3, accumulation=2 if name == "packed" else 1, same_steps=not packed)
    if packed:
        sizes = [np.mean([len(rows) for _, rows in trained[block]]) for block in ("host", "given", "windows")]
        assert min(sizes) > 1.2 and max(sizes) < 1.5 * min(sizes), "bins are as full as the host's"


@pytest.mark.parametrize("name", ["sft", "packed"])
def test_resumed_from_any_checkpoint_it_ends_the_same(make, tmp_path, name):
    block = {"apply": "sample", "weighting": "rank", "refresh_interval": 3, "k": 2}
    check_resumed(make(name, 16), tmp_path, lambda n: block, 2, num_epochs=2, save_total_limit=100)
    check_resumed(make(name, 16), tmp_path, given(tmp_path / "w", uneven), 3, num_epochs=2, save_total_limit=100)


@pytest.mark.parametrize("name", ["sft", "packed", "dpo"])
def test_epoch_share_shortens_the_run(make, tmp_path, name):
    settings = {"num_epochs": 2, "warmup_ratio": 0.25, "lr_scheduler": "linear"}
    whole = make(name, 40)(ica=given(tmp_path / "1", np.ones), **settings)
    whole.train()
    half = make(name, 40)(ica=given(tmp_path / "0.5", uneven, epoch_share=0.5), **settings)
    trained = record(half)
    half.train()
    assert abs(half.state.global_step - whole.state.global_step / 2) <= 1
    assert half.state.global_step == half.state.max_steps and half.state.epoch == pytest.approx(2)
    assert abs(half.args.warmup_steps - whole.args.warmup_steps / 2) <= 1
    assert half.state.log_history[-2]["learning_rate"] < 0.01 / 5 if "learning_rate" in half.state.log_history[-2] else True
    assert sum(table(half)["draws"]) == sum(len(rows) for _, rows in trained)


def test_a_row_that_is_drawn_often_stands_in_a_packed_line_more_than_once_with_its_tokens_left_out(make):
    block = {"apply": "sample", "weighting": "top", "keep": 0.1, "drop_tokens": 0.2, "k": 2}
    trainer = make("packed", sequence_len=256)(ica=block, micro_batch=1, num_epochs=2)
    trained = record(trainer)
    trainer.train()
    assert any(len(rows) > len(set(rows)) for _, rows in trained)
    assert any(
        len(dropped)
        for dropped in read_scores(callback_of(trainer).files.folder / "scores.parquet")["dropped_tokens"].to_pylist()
    )
