"""The policy with its adapter off, or with another one for a while, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import ICAError

# LoRA's beginnings that leave the base weights as they are.
BESIDE_THE_BASE = {"gaussian", "eva", "orthogonal"}


def require_adapter(model: nn.Module, why: str) -> None:
    """Raise ICAError unless the policy is a PEFT model. `why`: what needs the adapter."""
    if not (hasattr(model, "peft_config") and hasattr(model, "disable_adapter")):
        raise ICAError(
            f"ica.score: {why}, and this run trains the whole model. Train with LoRA, or use a scorer that needs no adapter (docs/scorers.md)."
        )


def require_lora(model: nn.Module, why: str) -> Any:
    """The configuration of the policy's LoRA.

    Raises:
        ICAError: no adapter, or another kind of adapter.
    """
    require_adapter(model, why)
    config = model.peft_config[_active(model)]
    if config.peft_type.value != "LORA":
        raise ICAError(f"ica.score: {why}, which needs LoRA; this run trains {config.peft_type.value}.")
    return config


def require_untouched_base(model: nn.Module) -> None:
    """Raise ICAError where the adapter took a part of the base weights, so that the base alone is no reference model."""
    start = getattr(model.peft_config[_active(model)], "init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in BESIDE_THE_BASE:
        raise ICAError(
            f"ica.score: `init_lora_weights: {start}` moves a part of the base weights into the adapter, so the policy with its adapter "
            "switched off is no reference. Use the default initialisation, or a scorer that needs no reference (docs/scorers.md)."
        )


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is the base model."""
    with _trainable_as_before(model), model.disable_adapter():
        yield


@contextmanager
def with_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Inside the block the adapter `name`, which the model has, is the active one in place of the policy's."""
    active = _active(model)
    with _trainable_as_before(model):
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(active)


@contextmanager
def adapter_swapped(model: nn.Module, name: str) -> Iterator[None]:
    """Inside the block an adapter `name` may be added and made active; afterwards it is gone and the policy's is active."""
    active = _active(model)
    with _trainable_as_before(model):
        try:
            yield
        finally:
            model.set_adapter(active)
            if name in model.peft_config:
                model.delete_adapter(name)


def _active(model: nn.Module) -> str:
    active = model.active_adapter
    if not isinstance(active, str):
        raise ICAError(
            f"ica.score: the policy has several active adapters ({active}); scorers that switch adapters need exactly one."
        )
    return active


@contextmanager
def _trainable_as_before(model: nn.Module) -> Iterator[None]:
    # PEFT decides anew which parameters train whenever an adapter is switched.
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)
