"""Where a scorer is not defined, and rows that cannot be scored."""

from __future__ import annotations

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from ica_plugin.data.store import Example, Sequence
from ica_plugin.errors import ICAError
from ica_plugin.expression import SCORERS
from ica_plugin.scorers import scores_for
from scored import (
    make_context,
    make_lora,
    score,
)
from tiny import make_model


@pytest.mark.parametrize(
    "name, kind, lora, message",
    [
        ("irm", "sft", True, "defined for preference pairs"),
        ("ica-irm", "unpaired", True, "defined for preference pairs"),
        ("irm", "pair", False, "trains the whole model"),
        ("rho", "sft", False, "trains the whole model"),
        ("influence", "sft", False, "trains the whole model"),
        ("datainf", "sft", False, "trains the whole model"),
    ],
)
def test_refusals(name, kind, lora, message):
    with pytest.raises(ICAError, match=message):
        score(make_context(name, kind, make_lora() if lora else make_model()))


@pytest.mark.parametrize("name, kind", [("rho", "sft"), ("irm", "pair")])
def test_an_adapter_that_took_a_part_of_the_base_is_no_reference(name, kind):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM")
    with pytest.raises(ICAError, match="`init_lora_weights: olora` moves a part of the base weights"):
        score(make_context(name, kind, get_peft_model(make_model(), adapter)))


@pytest.mark.parametrize("name", [name for name in SCORERS if "irm" not in name])
def test_a_row_without_supervised_tokens_harms_no_other(name):
    context = make_context(name, holdout_adapter={"steps": 2})
    whole = score(context)
    other = make_context(name, holdout_adapter={"steps": 2}, model=context.engine.model)
    bare = other.train[3].sequences[0]
    other.train[3] = Example((Sequence(bare.tokens, np.zeros(len(bare.tokens), bool)),), "sft")
    found = score(other)
    assert np.isnan(found[3]) or name in ("rds", "random")
    if name != "datainf":  # whose Hessian is over the rows
        rest = np.arange(8) != 3
        np.testing.assert_allclose(found[rest], whole[rest], atol=1e-4, rtol=1e-4)


def test_zero_rows():
    """A rank whose window has no row of its own."""
    for name in SCORERS:
        context = make_context(name, "pair", holdout_adapter={"steps": 1})
        context.rows, context.demonstrations = [], []
        assert all(len(column) == 0 for column in scores_for(context).values()), name
