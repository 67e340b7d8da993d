"""RHO and LossDiff."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from ica_plugin.errors import ICAError
from scored import (
    make_context,
    make_lora,
    reference_margin,
    row_loss,
    score,
    sign,
)
from tiny import make_model


@pytest.mark.parametrize("kind, length_normalize", [("sft", False), ("pair", False), ("pair", True), ("unpaired", False)])
def test_rho_with_a_given_adapter(kind, length_normalize, tmp_path):
    other = make_lora(seed=7)
    other.save_pretrained(tmp_path)
    context = make_context("rho", kind, holdout_adapter={"path": str(tmp_path)}, length_normalize=length_normalize)
    model, expected = context.engine.model, []
    for row in context.train:
        reference = reference_margin(model, row) if kind == "pair" and not length_normalize else None
        with torch.no_grad():
            expected.append(sign(row) * float(row_loss(model, row, reference) - row_loss(other, row, reference)))
    np.testing.assert_allclose(score(context), expected, atol=1e-4)
    assert np.std(expected) > 0.01


def test_rho_trains_on_the_holdout_once_and_keeps_the_adapter():
    context = make_context("rho", holdout_adapter={"steps": 40, "learning_rate": 0.02, "r": 4})
    first = score(context)
    # The holdout rows themselves must have become much likelier than under the policy.
    own = make_context("rho", holdout_adapter={"steps": 40, "learning_rate": 0.02, "r": 4})
    own.train, own.rows = own.holdout.examples, list(range(5))
    own.kept["adapter"] = context.kept["adapter"]
    assert score(own).min() > 1.0 > np.median(first)
    again = make_context("rho", model=context.engine.model, holdout_adapter={"steps": 40, "learning_rate": 0.02, "r": 4})
    again.kept["adapter"] = context.kept["adapter"]
    np.testing.assert_allclose(score(again), first, atol=1e-5)
    fresh = make_context("rho", model=context.engine.model, holdout_adapter={"steps": 40, "learning_rate": 0.02, "r": 4})
    np.testing.assert_allclose(score(fresh), first, atol=1e-5)


def test_rho_trains_an_adapter_on_the_embedding_and_leaves_unused_parts():
    """LoRA of an embedding has no `.weight`, and a matrix that no row uses (an expert, a vision tower) has no gradient."""
    model = make_model()
    model.unused = torch.nn.Linear(4, 4)
    adapter = LoraConfig(r=4, target_modules=["embed_tokens", "unused"], task_type="CAUSAL_LM")
    context = make_context("rho", model=get_peft_model(model, adapter), holdout_adapter={"steps": 3, "learning_rate": 0.1})
    assert np.abs(score(context)).max() > 1e-3


def test_a_missing_holdout_adapter_is_named(tmp_path):
    with pytest.raises(ICAError, match="no PEFT adapter there"):
        score(make_context("rho", holdout_adapter={"path": str(tmp_path)}))
