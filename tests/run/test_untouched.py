"""Scoring leaves training untouched: with all weights 1, whatever else is switched on, the run is the host's own."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, TrainerCallback

import tiny
from checks import callback_of, parameters
from runs import build

# Every row is in the best fraction of 1: scored every second update, and weighted 1.
ONES = {"weighting": "top", "keep": 1.0, "refresh_interval": 2, "retrieval": "policy"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}

SETTINGS = {
    "evaluation": EVALUATED,
    "early stopping": {**EVALUATED, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.3},
    "load_best_model_at_end": {**EVALUATED, "load_best_model_at_end": True},
    "gradient checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "bfloat16 autocast": {"bf16": True},
    "persistent workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "auto_find_batch_size": {"auto_find_batch_size": True, "per_device_train_batch_size": 4},
    "moving average": {},
    "dropout": {},
    "lora": {},
}


class MovingAverage(TrainerCallback):
    """An exponential moving average of the parameters, as such callbacks keep it."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, p in model.named_parameters():
            self.average[name].lerp_(p.detach(), 0.1)


def policy(name: str):
    if name == "dropout":
        return tiny.make_model(attention_dropout=0.3)
    if name == "lora":
        torch.manual_seed(0)
        return get_peft_model(
            tiny.make_model(), LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    return tiny.make_model()


def observed(folder, name: str, ica: dict | None):
    """Everything about a run that must be the same: losses and gradient norms of every step, evaluations, the end."""
    trainer = build(folder, ica, model=policy(name), **{"logging_strategy": "steps", "logging_steps": 1, **SETTINGS[name]})
    average = MovingAverage()
    trainer.add_callback(average)
    if name == "early stopping":
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    if name == "auto_find_batch_size":
        host_step = trainer.training_step

        def too_large(model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return host_step(model, inputs, *args, **kwargs)

        trainer.training_step = too_large
    torch.manual_seed(11)  # what the host does not seed, as the random states at the start
    trainer.train()
    keys = ("step", "loss", "grad_norm", "eval_loss", "learning_rate")
    history = [{key: entry[key] for key in keys if key in entry} for entry in trainer.state.log_history]
    history = [entry for entry in history if len(entry) > 1]
    return trainer, history, {**parameters(trainer), **{f"average {key}": value for key, value in average.average.items()}}


@pytest.mark.parametrize("name", SETTINGS)
def test_all_weights_one_is_the_host_s_own_run(tmp_path, name):
    plain, plain_history, plain_end = observed(tmp_path / "plain", name, None)
    weighted, history, end = observed(tmp_path / "ica", name, ONES)
    callback = callback_of(weighted)
    assert callback.state.counts.refreshes >= 2 and (callback.weights[~callback.weights.isnan()] == 1).all()
    assert history == plain_history and len(history) >= 4
    assert end.keys() == plain_end.keys() and all(torch.equal(end[key], plain_end[key]) for key in end)
    assert weighted.state.global_step == plain.state.global_step
    if name == "early stopping":
        assert plain.state.global_step < 12
    if name == "auto_find_batch_size":
        assert weighted._train_batch_size == 2


def test_scoring_between_two_steps_leaves_the_next_one_as_it_is(tmp_path):
    """The loss and the gradient of the step after a scoring, bit for bit, with dropout in play."""
    found = []
    for ica in (None, {**ONES, "refresh_interval": 1, "refresh_scope": "all"}):
        trainer = build(tmp_path / str(ica is None), ica, model=policy("dropout"), max_steps=3)
        steps, host_step = [], trainer.training_step

        def step(model, *args, host_step=host_step, steps=steps, **kwargs):
            loss = host_step(model, *args, **kwargs)
            gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
            steps.append((loss, gradient, torch.get_rng_state()))
            return loss

        trainer.training_step = step
        trainer.train()
        found.append(steps)
    assert len(found[0]) == len(found[1]) == 6
    for (loss, gradient, state), (other_loss, other_gradient, other_state) in zip(*found, strict=True):
        assert torch.equal(loss, other_loss) and torch.equal(state, other_state)
        assert all(torch.equal(gradient[name], other_gradient[name]) for name in gradient)
