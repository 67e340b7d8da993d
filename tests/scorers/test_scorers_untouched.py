"""Training notices nothing of any scorer."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ica_plugin.scorers import scores_for
from scored import (
    make_context,
    make_lora,
)


def state_of(model) -> tuple:
    parameters = {
        name: (p.data_ptr(), p.detach().clone(), p.requires_grad, p.grad if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    }
    modes = [module.training for module in model.modules()]
    return (
        parameters,
        modes,
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),
        list(model.peft_config),
        model.active_adapter,
    )


def assert_same_state(found: tuple, expected: tuple) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, (pointer, value, trains, grad) in expected[0].items():
        now = found[0][name]
        assert now[0] == pointer and torch.equal(now[1], value) and now[2] == trains, name
        assert (now[3] is None and grad is None) or torch.equal(now[3], grad), name
    assert found[1] == expected[1]
    assert torch.equal(found[2], expected[2]) and found[3] == expected[3] and (found[4] == expected[4]).all()
    assert found[5:] == expected[5:]


@pytest.mark.parametrize(
    "name, kind", [("rho", "sft"), ("rho", "pair"), ("irm", "pair"), ("influence", "pair"), ("datainf", "sft")]
)
def test_training_notices_nothing(name, kind):
    model = make_lora()
    ids = torch.randint(3, 512, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    context = make_context(name, kind, model, holdout_adapter={"steps": 3})
    before = state_of(model)
    scores_for(context)
    assert_same_state(state_of(model), before)


def test_a_run_with_every_adapter_scorer_and_equal_weights_is_the_plain_run(tmp_path):
    """Second adapters, gradients and refreshes between the steps change no bit of what is trained, dropout included."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from ica_plugin import attach
    from runs import tokenised
    from tiny import make_tokenizer

    ends = []
    for scored in (False, True):
        tokenizer, model = make_tokenizer(), make_lora()
        trainer = Trainer(
            model,
            TrainingArguments(
                str(tmp_path),
                use_cpu=True,
                report_to="none",
                max_steps=6,
                per_device_train_batch_size=2,
                seed=3,
                learning_rate=0.01,
            ),
            train_dataset=tokenised(12, 0),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        if scored:
            block = {
                "score": "rho + influence + datainf + likelihood",
                "weighting": "top",
                "keep": 1.0,
                "drop_tokens": None,
                "refresh_interval": 2,
                "refresh_scope": "all",
            }
            callback = attach(
                trainer, {**block, "influence": {"adam": True}, "holdout_adapter": {"steps": 2}}, holdout=tokenised(5, 9)
            )
        trainer.train()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert callback.state.counts.refreshes == 3 and ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
