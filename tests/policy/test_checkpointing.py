"""Where the run checkpoints its layers, so do the backwards of scoring, with the same gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ica_plugin.policy import precision
from ica_plugin.scorers import scores_for
from scored import make_context, make_lora

CHECKPOINTED = [{"use_reentrant": False}, {"use_reentrant": True}]


@pytest.fixture
def calls(monkeypatch):
    """Layers that ran checkpointed, by whether the layer itself was in training mode."""
    found, host = [], precision.checkpoint

    def counted(function, *args, **kwargs):
        def seen(*inputs):
            found.append(True)
            return function(*inputs)

        return host(seen, *args, **kwargs)

    monkeypatch.setattr(precision, "checkpoint", counted)
    return found


@pytest.mark.parametrize("settings", CHECKPOINTED)
@pytest.mark.parametrize("name, kind", [("influence", "sft"), ("influence", "pair"), ("datainf", "sft"), ("rho", "sft")])
def test_scorers_keep_the_run_s_checkpointing(name, kind, settings, calls):
    plain = scores_for(make_context(name, kind, make_lora(), holdout_adapter={"steps": 3}))[name]
    assert not calls
    model = make_lora()
    model.gradient_checkpointing_enable(settings)
    before = [(m.training, vars(m).get("_gradient_checkpointing_func")) for m in model.modules()]
    found = scores_for(make_context(name, kind, model, holdout_adapter={"steps": 3}))[name]
    assert len(calls) >= 2 * 8  # two layers, forward and again in the backward
    np.testing.assert_array_equal(found, plain)
    assert [(m.training, vars(m).get("_gradient_checkpointing_func")) for m in model.modules()] == before


def test_log_probs_are_not_checkpointed(calls):
    model = make_lora()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    scores_for(make_context("ica + likelihood", model=model))
    assert not calls


def test_a_layer_sees_eval_mode_in_its_checkpoint():
    """Layers of some models read their own `training` for a dropout."""
    model = make_lora()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layer, seen = model.get_base_model().model.layers[0], []
    host = layer.forward
    layer.forward = lambda *args, **kwargs: seen.append(layer.training) or host(*args, **kwargs)
    scores_for(make_context("influence", model=model))
    assert seen and not any(seen) and layer.training


def test_modes_are_switched_once_per_scoring(monkeypatch):
    from ica_plugin.policy import engine

    switched, host = [], engine.evaluating
    monkeypatch.setattr(engine, "evaluating", lambda *args, **kwargs: switched.append(1) or host(*args, **kwargs))
    context = make_context("influence + datainf + likelihood", n=12)
    assert context.engine.path
    switched.clear()
    scores_for(context)
    assert len(switched) == 1


def test_memory_that_runs_out_in_a_backward_says_what_to_do(monkeypatch):
    from ica_plugin.errors import ICAError

    def never(*args, **kwargs):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    context = make_context("influence")
    monkeypatch.setattr(torch.autograd, "grad", never)
    with pytest.raises(ICAError, match="out of memory in the backward of a single row .* gradient checkpointing"):
        scores_for(context)
