"""The reference model of a run: what its own loss compares the policy with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapters import require_adapter, require_untouched_base, with_adapter, without_adapter
from .engine import Engine


@dataclass(frozen=True)
class Reference:
    """Where a reference model's log-probs come from; without arguments, the policy with its adapter switched off.

    Attributes:
        adapter: name of another adapter of the policy, which TRL keeps as a frozen copy of the policy's first state.
        model: a model of its own.
    """

    adapter: str | None = None
    model: nn.Module | None = None

    def require(self, policy: nn.Module) -> None:
        """Raise ICAError where there is no reference: a whole model is trained, or the adapter took a part of the base."""
        if self.model is None:
            require_adapter(policy, "a reference model is the policy with its adapter switched off")
            if self.adapter is None:
                require_untouched_base(policy)

    @contextmanager
    def engine(self, policy: Engine) -> Iterator[Engine]:
        """An engine that gives the reference's log-probs inside the block."""
        if self.model is not None:
            yield policy.beside(self.model)
        elif self.adapter is not None:
            with with_adapter(policy.model, self.adapter):
                yield policy
        else:
            require_adapter(policy.model, "the DPO loss of a pair takes the policy with its adapter switched off as reference")
            with without_adapter(policy.model):
                yield policy


def reference_of(trainer: Any) -> Reference:
    """The reference that the trainer's own loss takes, asked of the trainer.

    A `ref_model` comes first in every host: TRL's and LLaMA-Factory's DPO and KTO look at their adapters only without one (Axolotl:
    `rl_adapter_ref_model`). Given a trained PeftModel, TRL 1.x keeps a frozen copy of its adapter as `ref`; TRL 0.24, and
    LLaMA-Factory on top of it, take the adapter that `ref_adapter_name` names, if any. Otherwise the adapter is switched off, also
    where TRL computed the reference's log-probs in advance (`precompute_ref_log_probs`): it did so in this order too.
    """
    model = getattr(trainer, "ref_model", None)
    if model is not None and model is not trainer.model:
        return Reference(model=trainer.accelerator.unwrap_model(model))
    name = trainer.ref_adapter_name if hasattr(trainer, "ref_adapter_name") else "ref"
    return Reference(adapter=name if name in getattr(trainer.model, "peft_config", {}) else None)
