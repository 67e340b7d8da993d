"""Every scorer under the bfloat16 autocast of a run ranks rows as it does in float32."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from ica_plugin.policy.engine import Engine
from ica_plugin.scorers import REGISTRY, scorers_without_spread, scores_for
from scored import CPU, make_context, make_lora, row_loss

TRAINED = {"steps": 30, "learning_rate": 0.02, "r": 4}
# Products of gradients, and differences to what 30 steps in bfloat16 came to: more of the rounding is left in them.
AGREEMENT = {"influence": 0.9, "datainf": 0.8, "rho": 0.9, "lossdiff": 0.9}


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def columns_of(name: str, kind: str, autocast=nullcontext, **settings) -> dict[str, np.ndarray]:
    context = make_context(name, kind, make_lora(), n=16, holdout_adapter=TRAINED, **settings)
    context.engine = Engine(context.engine.model, device=CPU, autocast=autocast)
    return scores_for(context)


@pytest.mark.parametrize("kind", ["sft", "pair"])
@pytest.mark.parametrize("name", REGISTRY)
def test_a_scorer_under_autocast_ranks_as_in_float32(name, kind):
    if name == "irm" and kind == "sft":
        pytest.skip("irm is of pairs")
    exact, rounded = columns_of(name, kind), columns_of(name, kind, bfloat16)
    assert scorers_without_spread(rounded) == []
    assert spearmanr(exact[name], rounded[name]).statistic >= AGREEMENT.get(name, 0.95)
    assert 0.5 < rounded[name].std() / exact[name].std() < 2


@pytest.mark.parametrize("outer", [nullcontext, bfloat16])
def test_the_holdout_adapter_learns_under_autocast(outer):
    """Its scores are of what it has learnt, not of the adapter as it was initialised, also within a caller's own region."""
    context = make_context("rho", n=8, holdout_adapter={**TRAINED, "steps": 60})
    context.engine = Engine(context.engine.model, device=CPU, autocast=bfloat16)
    context.train, context.rows = context.holdout.examples, list(range(5))
    with outer():
        if outer is not nullcontext:  # the caller's region has its own half-precision copies already
            context.engine.model(input_ids=torch.ones(1, 4, dtype=torch.long))
        gained = scores_for(context)["rho"]
    with torch.no_grad():
        policy = [float(row_loss(context.engine.model, row)) for row in context.train]
    assert gained.min() > 0.5 and (policy - gained).mean() < 0.5 * np.mean(policy)


def test_a_region_of_the_caller_s_keeps_no_copy_of_ours():
    """Copies that scoring made without gradient would cut the caller's own backward off."""
    context = make_context("likelihood", n=4)
    model = context.engine.model
    with bfloat16():
        scores_for(context)
        ids = torch.randint(3, 512, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora" in n)


def test_scores_without_spread_are_named():
    columns = {
        "base": np.zeros(4),
        "rho": np.zeros(4),
        "irm:maths": np.array([2.0, np.nan, 2.0, 2.0]),
        "ica": np.array([1.0, 1.0, 1.0, 1.1]),
        "rds": np.full(4, np.nan),
    }
    assert scorers_without_spread(columns) == ["rho", "irm:maths"]
    assert scorers_without_spread({"ica": np.array([1.0])}) == []
