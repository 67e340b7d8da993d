"""Eval mode, the trainer's autocast, and every random state put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, gradient: bool = False) -> Iterator[None]:
    """Eval mode, without gradient unless asked for; every module's own mode and all random states are put back afterwards.

    On a CPU, bitsandbytes' 4-bit layers repack their weights at the first inference forward into a layout that has no
    backward, and keep it: training after it would get no gradient through them. That is switched off meanwhile.
    """
    modes = {module: module.training for module in model.modules()}
    repacking = [module for module in modes if getattr(module, "support_avx512bf16_for_cpu", False)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(gradient):
            model.eval()
            for module in repacking:
                module.support_avx512bf16_for_cpu = False
            yield
    finally:
        for module in repacking:
            module.support_avx512bf16_for_cpu = True
        for module, training in modes.items():
            module.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)
