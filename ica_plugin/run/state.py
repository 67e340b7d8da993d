"""What a checkpoint keeps, so that a resumed run goes on with the very weights of the run that was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..config import ICAConfig
from ..data.holdout import Holdout
from ..data.store import Example
from ..errors import ICAError
from ..log import get_logger

STATE_FILE = "ica_state.safetensors"


# Keys of the block that may change between a run and its continuation: they touch no weight.
FREE_KEYS = {"on_resume_mismatch"}


@dataclass(frozen=True)
class State:
    """What is kept.

    Attributes:
        tensors: weights, scores and demonstrations, by name.
        record: counters and the fingerprint, as JSON types.
    """

    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]


def save_state(folder: str | os.PathLike, state: State) -> None:
    """Write the state into a checkpoint's folder, whole or not at all.

    A full disk is reported and the run goes on: resuming from that checkpoint scores the rows again.
    """
    path = Path(folder) / STATE_FILE
    partial = path.with_name(f".{STATE_FILE}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state.tensors, partial, metadata={"record": json.dumps(state.record)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        get_logger().warning(
            "%s could not be written (%s). Training goes on; a run resumed from this checkpoint scores its rows again.",
            path,
            error,
        )


def load_state(folder: str | os.PathLike) -> State | None:
    """Read the state of a checkpoint; None if it has none.

    Raises:
        ICAError: a damaged file.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return State({name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["record"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ICAError(
            f"{path} is damaged ({error}). Resume from an earlier checkpoint, or delete the file to score the rows again."
        ) from error


def fingerprint(config: ICAConfig, train: list[Example], holdout: Holdout | None, given: Any, model: nn.Module) -> dict[str, Any]:
    """What must be the same for a state to be the run's own, by the name a user knows it by.

    Args:
        config: the block.
        train: train rows, in order.
        holdout: rows and named sets; None with given weights.
        given: given weights, or None.
        model: the policy; the names and shapes of its parameters count, and the name of its folder.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = Path(str(getattr(base.config, "_name_or_path", ""))).name
    shapes = (f"{key}{tuple(parameter.shape)}" for key, parameter in base.named_parameters())
    return {
        "train rows": _digest(sequence.digest for row in train for sequence in row.sequences),
        "holdout": _digest(_parts_of_holdout(holdout)) if holdout is not None else None,
        "weights": _digest([given.tobytes().hex()]) if given is not None else None,
        "model": f"{type(base).__name__} {name} {_digest(shapes)}",
        "block": config.model_dump(mode="json", exclude=FREE_KEYS | {"holdout", "weights"}),
    }


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, each with how a user would name it."""
    found = [f"the {name}" for name in ("train rows", "holdout", "weights", "model") if then.get(name) != now[name]]
    before, after = then.get("block", {}), now["block"]
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            found.append(f"ica.{key} (then {before.get(key)!r}, now {after.get(key)!r})")
    return found


def _parts_of_holdout(holdout: Holdout) -> Iterable[str]:
    yield from (sequence.digest for row in holdout.examples for sequence in row.sequences)
    yield json.dumps(holdout.sets)


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\n")
    return digest.hexdigest()
