"""What must be the same for a state, or for scores, to be a run's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..config import ICAConfig
from ..data.holdout import Holdout
from ..data.public import public_block
from ..data.store import Rows

# Keys of the block that may change between a run and its continuation: they touch no weight, or stand for rows that are compared.
NOT_COMPARED = {"on_resume_mismatch", "holdout", "weights"}


def fingerprint(config: ICAConfig, train: Rows, holdout: Holdout, given: Any, model: nn.Module) -> dict[str, Any]:
    """What must be the same for a state to be the run's own, by the name a user knows it by.

    Args:
        config: the block.
        train: train rows, in order.
        holdout: rows and named sets.
        given: given weights, or None.
        model: the policy; the names and shapes of its parameters count, and the name of its folder.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = Path(str(getattr(base.config, "_name_or_path", ""))).name
    shapes = (f"{key}{tuple(parameter.shape)}" for key, parameter in base.named_parameters())
    return {**facts_of(config, train, holdout, given), "model": f"{type(base).__name__} {name} {digest(shapes)}"}


def facts_of(config: ICAConfig, train: Rows, holdout: Holdout, given: Any) -> dict[str, Any]:
    """The part of `fingerprint` that is known before the model is: the rows and the block."""
    return {
        "train rows": train.digest,
        "holdout": holdout.digest if given is None else None,
        "weights": digest([given.tobytes().hex()]) if given is not None else None,
        "block": {key: value for key, value in public_block(config).items() if key not in NOT_COMPARED},
    }


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, each with how a user would name it."""
    found = [f"the {name}" for name in ("train rows", "holdout", "weights", "model") if then.get(name) != now[name]]
    before, after = then.get("block", {}), now["block"]
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            found.append(f"ica.{key} (then {before.get(key)!r}, now {after.get(key)!r})")
    return found


def digest(parts: Iterable[str]) -> str:
    """One hash of many texts in their order."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part.encode())
        found.update(b"\n")
    return found.hexdigest()
