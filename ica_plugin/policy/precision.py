"""Eval mode, the run's autocast, and every random state: what a forward of ours may change, put back in one place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

Autocast = Callable[[], AbstractContextManager]

# Device types of torch and of its known extensions, as modules of `torch`.
DEVICE_TYPES = ("cuda", "xpu", "mps", "mtia", "npu", "mlu", "musa", "hpu", "sdaa")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient; every module's own mode and all random states are put back afterwards.

    On a CPU, bitsandbytes' 4-bit layers repack their weights at the first inference forward into a layout that has no
    backward, and keep it: training after it would get no gradient through them. That is switched off meanwhile.
    """
    modes = {module: module.training for module in model.modules()}
    repacking = [module for module in modes if getattr(module, "support_avx512bf16_for_cpu", False)]
    put_back = random_states()
    try:
        with torch.no_grad():
            model.eval()
            for module in repacking:
                module.support_avx512bf16_for_cpu = False
            yield
    finally:
        for module in repacking:
            module.support_avx512bf16_for_cpu = True
        for module, training in modes.items():
            module.training = training
        put_back()


def checkpointed_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that the run has switched gradient checkpointing on for."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]


@contextmanager
def checkpointing(layers: list[GradientCheckpointingLayer]) -> Iterator[None]:
    """The layers checkpoint in eval mode too, inside the block and while gradients are on.

    transformers' layers checkpoint only where their own `training` is set, and a run that fits into memory only with
    checkpointing would not fit without. So the flag is set on these layers alone (what is below them stays in eval mode) and
    taken back for the layer's own forward, which may read it for a dropout. The checkpoint is torch's own without
    re-entrance, whatever the run's is: a re-entrant one cannot serve `torch.autograd.grad`. Models that checkpoint in other
    ways than through `GradientCheckpointingLayer` (code from the hub) run without.
    """
    before = [(layer, layer.training, vars(layer).get("_gradient_checkpointing_func")) for layer in layers]
    try:
        for layer in layers:
            layer.training = True
            layer._gradient_checkpointing_func = partial(_checkpointed, layer)
        yield
    finally:
        for layer, training, function in before:
            layer.training = training
            if function is None:
                del layer._gradient_checkpointing_func
            else:
                layer._gradient_checkpointing_func = function


def _checkpointed(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    def in_eval_mode(*args: Any) -> Any:
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    return checkpoint(in_eval_mode, *args, use_reentrant=False) if torch.is_grad_enabled() else in_eval_mode(*args)


@contextmanager
def one_forward(autocast: Autocast) -> Iterator[None]:
    """The run's autocast around a single forward.

    Autocast keeps the half-precision copy of a float32 weight until the outermost region ends, so a region must span neither
    an update nor a change of adapters: what comes after would see the old weights. Where the caller's own region is
    around us, leaving ours ends nothing, and the copies are dropped by hand, before (the caller's) and after (ours, made without
    gradient).
    """
    torch.clear_autocast_cache()
    try:
        with autocast():
            yield
    finally:
        torch.clear_autocast_cache()


def random_states() -> Callable[[], None]:
    """Note the random states of Python, numpy, the CPU and every device in use; the result puts them back."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = [(backend, _state(backend)) for backend in _backends()]

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for backend, state in devices:
            (backend.set_rng_state_all if hasattr(backend, "set_rng_state_all") else backend.set_rng_state)(state)

    return put_back


def empty_caches() -> None:
    """Give memory that torch keeps but does not use back to every device in use."""
    for backend in _backends():
        if hasattr(backend, "empty_cache"):
            backend.empty_cache()


def _state(backend: Any) -> Any:
    return backend.get_rng_state_all() if hasattr(backend, "get_rng_state_all") else backend.get_rng_state()


def _backends() -> list[Any]:
    """torch's modules of the device types in use. One that was never started is not started by asking."""
    found = []
    for name in DEVICE_TYPES:
        backend = getattr(torch, name, None)
        started = getattr(backend, "is_initialized", None) or getattr(backend, "is_available", None)
        if started is not None and hasattr(backend, "get_rng_state") and started():
            found.append(backend)
    return found
