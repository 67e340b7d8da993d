"""The reference model is the one that the run's own loss takes, asked of the trainer."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig

from ica_plugin.errors import ICAError
from ica_plugin.policy.reference import Reference, reference_of
from ica_plugin.scorers import scores_for
from scored import BETA, logprob, make_context, make_lora, row_loss
from tiny import make_model


def trainer_of(model, **attributes):
    return SimpleNamespace(model=model, accelerator=Accelerator(cpu=True), **attributes)


def with_ref_adapter():
    """A trained LoRA, and beside it TRL's frozen copy of it."""
    model = make_lora()
    model.add_adapter("ref", LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("default")
    return model.train()


def test_the_trainer_is_asked():
    own, other = make_lora(), make_model(1)
    assert reference_of(trainer_of(own)) == Reference()
    assert reference_of(trainer_of(make_model())) == Reference()
    assert reference_of(trainer_of(own, ref_model=None)) == Reference()
    assert reference_of(trainer_of(own, ref_model=other)).model is other
    assert reference_of(trainer_of(own, ref_model=own)) == Reference()  # LLaMA-Factory, where nothing is trained
    copied = with_ref_adapter()
    assert reference_of(trainer_of(copied)) == Reference(adapter="ref")  # TRL 1.x
    assert reference_of(trainer_of(copied, ref_adapter_name=None)) == Reference()  # TRL 0.24 switches adapters off all the same
    assert reference_of(trainer_of(copied, ref_adapter_name="ref")) == Reference(adapter="ref")
    assert reference_of(trainer_of(copied, ref_model=other)).model is other


def test_irm_against_the_copy_of_the_first_adapter():
    """0 before the first step, and afterwards the margin against the copy, not against the bare base."""
    context = make_context("irm", "pair", with_ref_adapter())
    context.reference = reference_of(trainer_of(context.engine.model))
    model = context.engine.model
    assert (scores_for(context)["irm"] == 0).all()
    with torch.no_grad():
        first = [float(logprob(model, row.sequences[0]) - logprob(model, row.sequences[1])) for row in context.train]
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter += 0.05
        now = [float(logprob(model, row.sequences[0]) - logprob(model, row.sequences[1])) for row in context.train]
    model.train()
    again = make_context("irm", "pair", model)
    again.reference = context.reference
    np.testing.assert_allclose(scores_for(again)["irm"], BETA * np.subtract(now, first), atol=1e-4)
    assert np.std(np.subtract(now, first)) > 0.01
    assert model.active_adapter == "default"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".default." in n
    }


@pytest.mark.parametrize("name", ["irm", "lossdiff", "influence"])
def test_an_explicit_reference_model(name):
    """Taken in place of the adapter switched off; `irm` then needs no adapter at all."""
    other = make_model(seed=5).train()
    policy = make_model() if name == "irm" else make_lora()
    context = make_context(name, "pair", policy, holdout_adapter={"steps": 2})
    context.reference = Reference(model=other)
    found = scores_for(context)[name]
    assert other.training

    def margin(model, row):
        with torch.no_grad():
            return float(logprob(model, row.sequences[0]) - logprob(model, row.sequences[1]))

    references = [margin(other, row) for row in context.train]
    if name == "irm":
        expected = BETA * np.subtract([margin(policy, row) for row in context.train], references)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    else:
        beside = make_context(name, "pair", policy, holdout_adapter={"steps": 2})
        assert np.abs(scores_for(beside)[name] - found).max() > 1e-3
    if name == "influence":
        shown = [(row, margin(other, row)) for row in context.shown]
        target = [gradient_of(policy, row, reference) for row, reference in shown]
        own = [gradient_of(policy, row, reference) for row, reference in zip(context.train, references, strict=True)]
        expected = [sum((g * np.mean([t[i] for t in target], axis=0)).sum() for i, g in enumerate(row)) for row in own]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def gradient_of(model, row, reference: float) -> list[np.ndarray]:
    model.zero_grad()
    row_loss(model, row, reference).backward()
    found = [p.grad.double().numpy().copy() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def test_no_reference_at_all():
    with pytest.raises(ICAError, match="trains the whole model"):
        scores_for(make_context("irm", "pair", make_model()))
