"""LLaMA-Factory's own trainer classes, in this process."""

import pytest
import tiny
from checks import check_gradients, check_kto_gradients, check_packed_gradients
from llamafactory_harness import LORA, Maker, kto_rows

ROWS = {
    "sft": lambda: tiny.sft_rows(8, turns=2),
    "sigmoid": lambda: tiny.pair_rows(8),
    "ipo": lambda: tiny.pair_rows(8),
    "hinge": lambda: tiny.pair_rows(8),
    "simpo": lambda: tiny.pair_rows(8),
    "orpo": lambda: tiny.pair_rows(8),
}


@pytest.fixture
def make(tmp_path, tiny_model):
    return lambda kind, rows=None, **settings: Maker(tmp_path, tiny_model, kind, rows or ROWS[kind](), **settings)


@pytest.mark.parametrize("kind", ROWS)
def test_gradients(make, tmp_path, kind):
    print(kind, check_gradients(make(kind), tmp_path, token_mean=kind == "sft"))


def test_gradients_of_lora(make, tmp_path):
    check_gradients(make("sft", **LORA), tmp_path, token_mean=True)


@pytest.mark.parametrize("kind", ["sigmoid", "simpo"])
def test_gradients_with_an_additive_sft_term(make, tmp_path, kind):
    check_gradients(make(kind, pref_ftx=0.7), tmp_path, token_mean=False)


def test_gradients_of_neat_packing(make, tmp_path):
    check_packed_gradients(make("sft"), tmp_path, bins=2, neat_packing=True)


def test_gradients_of_plain_packing(make, tmp_path):
    check_packed_gradients(make("sft"), tmp_path, bins=2, isolated=False, packing=True)


def test_gradients_of_kto(make, tmp_path):
    def fields(batch):
        rows, kl = (
            (batch[f"{p}input_ids"], batch[f"{p}attention_mask"], batch[f"{p}labels"] != -100) for p in ("", "kl_")
        )
        return rows, kl, batch["kto_tags"]

    check_kto_gradients(make("kto", kto_rows(8)), tmp_path, fields)
