"""What a scorer needs of a run, and whether the run has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..data.store import Kind
from ..errors import ICAError
from ..policy.adapters import require_adapter, require_lora, require_untouched_base
from ..policy.reference import Reference


@dataclass(frozen=True)
class Needs:
    """What a scorer needs. For `adapter` and `lora` the text is the reason, as the error begins with it.

    Attributes:
        demonstrations: holdout rows for each row, found by `retrieval`.
        pairs: preference pairs.
        adapter: a PEFT adapter.
        lora: a LoRA.
        untouched_base: base weights of which the adapter took no part, so that another adapter may stand on them.
        reference: a reference model.
        gradients: a backward for each row.
        trained_adapter: a second adapter, trained on the holdout or given.
    """

    demonstrations: bool = False
    pairs: bool = False
    adapter: str | None = None
    lora: str | None = None
    untouched_base: bool = False
    reference: bool = False
    gradients: bool = False
    trained_adapter: bool = False


def require_met(needs: Mapping[str, Needs], model: nn.Module, kind: Kind, reference: Reference) -> None:
    """Raise where a run does not have what its scorers need.

    Args:
        needs: of each scorer, by its name.
        model: the policy.
        kind: of the train rows.
        reference: the run's reference model.

    Raises:
        ICAError: what is missing, and for which scorer.
    """
    for name, need in needs.items():
        if need.pairs and kind != "pair":
            raise ICAError(
                f"ica.score: {name} is defined for preference pairs, and this run trains on {kind} rows. "
                "Use ica, likelihood or another scorer of docs/scorers.md."
            )
        if need.adapter:
            require_adapter(model, need.adapter)
        if need.lora:
            require_lora(model, need.lora)
        if need.untouched_base:
            require_untouched_base(model)
        if need.reference:
            reference.require(model)
