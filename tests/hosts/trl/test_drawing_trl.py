"""`apply: sample` in TRL's own trainers."""

from __future__ import annotations

import pytest

from draw_checks import ONES, check_draws, check_equal_weights, check_resumed
from ica_plugin.errors import ICAError
from trl_harness import Maker, kto_rows, pair_rows, sft_rows

ROWS = {"kto": kto_rows, "dpo": pair_rows, "simpo": pair_rows}
PACKING = {"packing": True, "max_length": 64}


@pytest.fixture
def make(tmp_path):
    return lambda kind, n=15, **settings: Maker(tmp_path, kind, ROWS.get(kind, sft_rows)(n), **settings)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_equal_weights_are_the_host_s_own_run(make, tmp_path, kind):
    check_equal_weights(make(kind), tmp_path, num_train_epochs=2)


def test_equal_weights_are_the_host_s_own_padding_free_run(make, tmp_path):
    check_equal_weights(make("sft", padding_free=True, max_length=None), tmp_path, num_train_epochs=2)


@pytest.mark.parametrize("kind", ["sft", "dpo", "simpo", "kto"])
def test_rows_are_trained_as_often_as_the_file_says(make, tmp_path, kind):
    check_draws(make(kind), tmp_path, num_train_epochs=2, accumulation=2, dataloader_num_workers=int(kind == "dpo"))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_resumed_from_any_checkpoint_it_ends_the_same(make, tmp_path, kind):
    check_resumed(make(kind, 9), tmp_path, lambda n: {"apply": "sample", "refresh_interval": 3, "k": 2}, 2, num_train_epochs=2)


def test_packed_rows_cannot_be_drawn(make, capfd):
    with pytest.raises(ICAError, match="rows were packed before the trainer was built.* or set `apply: gradient`"):
        make("sft", 40, **PACKING)(ica={"apply": "sample"})
    trainer = make("sft", 40, **PACKING)(ica={**ONES, "apply": "auto"}, max_steps=2)
    assert "apply: gradient, since the rows were packed" in capfd.readouterr().err
    trainer.train()
    assert make("sft")(ica={"apply": "auto"}).callback_handler.callbacks[-1].drawing is not None, "auto, where rows can be drawn"
