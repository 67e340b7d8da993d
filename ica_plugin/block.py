"""Parts of the `ica:` block: what every level of it does alike, its two blocks within, and checks of single values."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .errors import ICAError
from .expression import parse_score


class Block(BaseModel):
    """Keys in a user's file: an unknown one is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _suggest_known_keys(cls, block: Any) -> Any:
        if not isinstance(block, dict):
            return block
        for key in block:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean `{near[0]}`? " if near else ""
                raise ValueError(f"unknown key `{key}`: {hint}Known keys: {', '.join(cls.model_fields)}")
        return block


class HoldoutAdapter(Block):
    """`holdout_adapter:`, the LoRA tuned on the holdout that `rho` and `lossdiff` compare with."""

    path: str | None = Field(None, min_length=1, description="A saved LoRA on the same base, instead of training one.")
    r: int = Field(8, ge=1, description="Rank.")
    steps: int = Field(100, ge=1, description="Optimizer steps of 8 holdout rows each.")
    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False, description="Of AdamW, falling linearly to 0.")


class Influence(Block):
    """`influence:`, what the scorer of that name does with the gradients."""

    adam: bool = Field(False, description="Precondition the row's gradient with the optimizer's moments (LESS).")
    truncate: tuple[float, float] | None = Field(
        None, description="Two quantiles outside of which influence does not count (TIF)."
    )

    @field_validator("truncate")
    @classmethod
    def _check_truncate(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        return value if value is None else check_quantiles(value)


def check_quantiles(value: tuple[float, float]) -> tuple[float, float]:
    """Two quantiles in order; raises ValueError otherwise."""
    if not 0 <= value[0] < value[1] <= 1:
        raise ValueError("two quantiles with 0 ≤ low < high ≤ 1, as in [0.25, 0.75]")
    return value


def check_sets(value: str | dict | list | None) -> str | dict | list | None:
    """What stands under `holdout`; raises ValueError where a list is not of named sets, or nothing is named."""
    if isinstance(value, list):
        names = [entry.get("name") for entry in value]
        if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise ValueError(
                "a list of holdout sets needs a `name` of its own for each, as in `- name: maths` with `path: maths.jsonl`"
            )
        if any(len(entry) < 2 for entry in value):
            raise ValueError("every holdout set needs a `path` beside its `name`")
    if value in ("", {}):
        raise ValueError("is empty; give a path, a hub id, or a dataset entry with `path:`")
    return value


def check_interval(value: Any) -> Any:
    """What stands under `refresh_interval`; raises ValueError for another value than the allowed ones."""
    if value in ("never", "epoch"):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (value >= 1 if isinstance(value, int) else 0 < value < 1):
        return value
    raise ValueError("allowed: never, epoch, a whole number of optimizer steps ≥ 1, or a fraction of the run between 0 and 1")


def check_drop_tokens(value: Any) -> Any:
    """What stands under `drop_tokens`; raises ValueError for another value than the allowed ones."""
    share = isinstance(value, float) and 0 < value < 1
    if value is None or value == "auto" or share:
        return value
    raise ValueError("allowed: auto, or a share of the tokens between 0 and 1, as in 0.1")


def check_score(value: str) -> str:
    """What stands under `score`; raises ValueError where it names no scorers."""
    if value.strip() != "auto":
        try:
            parse_score(value)
        except ICAError as error:
            raise ValueError(str(error)) from None
    return value.strip()
