"""The `ica:` block: every key, its default, and what is allowed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from .block import Block, HoldoutAdapter, Influence, check_drop_tokens, check_interval, check_quantiles, check_score, check_sets
from .errors import ICAError
from .expression import BAND_SCORERS, SHOWS_DEMONSTRATIONS, parse_score, parts_of

BUILTIN_RETRIEVAL = ("policy", "bm25", "random")
# What `apply: auto` means where single rows can be drawn (docs/evidence.md).
AUTO_APPLY: Literal["sample", "gradient"] = "sample"
# Keys that mean nothing but with one weighting, so that giving one says which.
IMPLIED_WEIGHTINGS = {"temperature": "softmax", "winsorize": "minmax", "keep": "top", "band": "band"}


class ICAConfig(Block):
    """The `ica:` block. Only `holdout` is required (or `weights`, which replaces scoring)."""

    model_config = ConfigDict(validate_default=True)

    holdout: str | dict[str, Any] | list[dict[str, Any]] | None = Field(
        None,
        description="The good examples: a path, a hub id, a dataset entry as under the host's `datasets`, or a list of named sets.",
    )
    balance: Literal["mean", "max", "round_robin"] = Field(
        "mean", description="How the scores against several holdout sets become one: mean | max | round_robin."
    )
    k: int = Field(3, ge=1, description="Demonstrations per row.")
    refresh_interval: Literal["never", "epoch"] | int | float = Field(
        "never", description="never (score once, before the first step) | epoch | N (optimizer steps) | a fraction of the run."
    )
    refresh_scope: Literal["window", "all"] = Field(
        "window", description="What a refresh scores: the rows of the coming interval, or all rows."
    )
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="Of `weighting: softmax`; lower is sharper.")
    weighting: Literal["auto", "softmax", "minmax", "rank", "top", "band"] = Field(
        "auto",
        description="How scores become weights: softmax | minmax | rank | top | band. auto: the one whose key is given (temperature, "
        "winsorize, keep, band), else top where rows are drawn and rank where gradients are scaled.",
    )
    winsorize: float = Field(
        0.01,
        ge=0,
        lt=0.5,
        description="Of `weighting: minmax`: scores are first clipped to these quantiles; 0 is the paper's own.",
    )
    keep: float = Field(0.5, gt=0, le=1, description="Of `weighting: top`: the best fraction, weighted alike; the rest is 0.")
    band: tuple[float, float] = Field(
        (0.25, 0.75), description="Of `weighting: band`: rows between these two quantiles are weighted alike; the rest is 0."
    )
    score: str = Field(
        "auto",
        description="A scorer, or a sum as in `ica + likelihood` or `0.5*ica + likelihood`; see docs/scorers.md. auto: ica + likelihood "
        "for SFT, ica for pairs and KTO.",
    )
    apply: Literal["auto", "sample", "gradient"] = Field(
        "auto",
        description="sample (a row is trained as often as its weight says) | gradient (every row once, its gradient scaled). auto: "
        "sample, and gradient where the host packs rows before training, so that single ones cannot be drawn.",
    )
    candidates: int = Field(
        2,
        ge=1,
        description="Of `apply: sample` with a refresh in steps: rows scored per row trained; each once before any again.",
    )
    drop_tokens: Literal["auto"] | float | None = Field(
        "auto",
        description="SFT: supervised tokens that stay surprising after the demonstrations are left out of the loss. auto: those less likely "
        "than all but 1 % of the holdout's own tokens; or a share of the train tokens, as in 0.1; null: none. Where it is not given, auto "
        "with a frozen output embedding (LoRA), else null.",
    )
    epoch_share: float = Field(
        1.0, gt=0, le=1, description="Of `apply: sample`: places of an epoch as a share of the rows; below 1 a shorter run."
    )
    score_tokens: int | None = Field(
        None,
        ge=1,
        description="Only the first so many supervised tokens of a row are scored (of a pair: of each response), and nothing after them is "
        "computed. Default: all.",
    )
    combine: Literal["rank", "zscore"] = Field("rank", description="How the scorers of a sum are put on one scale.")
    holdout_adapter: HoldoutAdapter = Field(
        HoldoutAdapter(), description="Of `rho` and `lossdiff`: path, or r, steps, learning_rate."
    )
    influence: Influence = Field(Influence(), description="Of `influence`: adam, truncate.")
    length_normalize: bool | None = Field(
        None, description="Mean log-prob per token instead of the sum. Default: true for preference pairs."
    )
    retrieval: str = Field("policy", min_length=1, description="policy | bm25 | random | a sentence-transformers id or folder.")
    retrieval_groups: int | None = Field(
        None,
        ge=1,
        description="Rows share this many demonstration sets, so that the context costs little. Default: each row has its own.",
    )
    budget: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Scoring takes at most this share of the training time; rows that it does not reach get the "
        "weight that their nearest scored neighbours suggest. Default: every row is scored.",
    )
    weights: str | None = Field(
        None, description="A parquet, csv or jsonl of row → weight, or a column of the dataset: train with these, never score."
    )
    max_weight: float = Field(10.0, gt=1, allow_inf_nan=False, description="No softmax weight is above this.")
    on_resume_mismatch: Literal["error", "rescore"] = Field(
        "error", description="A checkpoint whose data, holdout, model or block differs: stop, or score all rows again."
    )
    seed: int = Field(
        42, ge=0, description="Of the draws, random retrieval, the `random` scorer, the holdout adapter and `datainf`'s sample."
    )

    @field_validator("refresh_interval", mode="before")
    @classmethod
    def _check_interval(cls, value: Any) -> Any:
        return check_interval(value)

    @field_validator("drop_tokens", mode="before")
    @classmethod
    def _check_drop_tokens(cls, value: Any) -> Any:
        return check_drop_tokens(value)

    @field_validator("band")
    @classmethod
    def _check_band(cls, value: tuple[float, float]) -> tuple[float, float]:
        return check_quantiles(value)

    @field_validator("score")
    @classmethod
    def _check_score(cls, value: str) -> str:
        return check_score(value)

    @field_validator("holdout")
    @classmethod
    def _check_holdout(cls, value: str | dict | list | None) -> str | dict | list | None:
        return check_sets(value)

    @model_validator(mode="after")
    def _check_together(self) -> ICAConfig:
        check_together(self)
        return self

    def check_kind(self, kind: str) -> None:
        """Raise ICAError for a key that does not go with rows of this kind: sft, pair or unpaired."""
        if self._names("drop_tokens") and self.drop_tokens is not None and kind != "sft":
            raise ICAError(
                f"ica.drop_tokens: the run trains on {'preference pairs' if kind == 'pair' else 'KTO rows'}, whose loss is no mean over "
                "tokens, so that none can be left out of it. Remove the key; it goes with SFT."
            )

    def _may_drop(self, kind: str) -> bool:
        return kind == "sft" and self.budget is None and self.weights is None

    def _names(self, key: str) -> bool:
        return key in self.model_fields_set

    def resolved(self, kind: str, draws: bool, drops: bool = True) -> ICAConfig:
        """The block with what the evidence says in place of every `auto` (docs/evidence.md).

        Args:
            kind: of the run's rows: sft, pair or unpaired.
            draws: single rows can be drawn, so that `apply: auto` means `sample`.
            drops: tokens can be left out whatever the host's loss is, so that they are without being asked for.

        Raises:
            ICAError: a key that does not go with these rows.
        """
        self.check_kind(kind)
        apply = self.apply if self.apply != "auto" else AUTO_APPLY if draws else "gradient"
        implied = next((name for key, name in IMPLIED_WEIGHTINGS.items() if key in self.model_fields_set), None)
        weighting = implied or ("top" if apply == "sample" else "rank")
        score = "ica + likelihood" if kind == "sft" and self.budget is None else "ica"
        return self.model_copy(
            update={
                "apply": apply,
                "weighting": weighting if self.weighting == "auto" else self.weighting,
                "score": score if self.score == "auto" else self.score,
                "drop_tokens": self.drop_tokens if self._names("drop_tokens") or (drops and self._may_drop(kind)) else None,
                "length_normalize": kind == "pair" if self.length_normalize is None else self.length_normalize,
            }
        )

    @property
    def sets(self) -> dict[str, ICAConfig]:
        """The block for each holdout set alone, by the set's name; "" where there is one holdout without a name."""
        if not isinstance(self.holdout, list):
            return {"": self}
        alone = [(entry["name"], {key: value for key, value in entry.items() if key != "name"}) for entry in self.holdout]
        # A path alone is read like the run's first dataset.
        return {
            name: self.model_copy(update={"holdout": entry["path"] if list(entry) == ["path"] else entry})
            for name, entry in alone
        }

    @property
    def needs_demonstrations(self) -> bool:
        """Whether each row's demonstrations are looked for."""
        return self.shows_demonstrations or self.drop_tokens is not None

    @property
    def shows_demonstrations(self) -> bool:
        """Whether a scorer of `score` needs each row's demonstrations, so that a row without any has no score."""
        return self.score == "auto" or not SHOWS_DEMONSTRATIONS.isdisjoint(parts_of(parse_score(self.score)))

    def interval_steps(self, total_steps: int) -> int | None:
        """Optimizer steps between refreshes; None where the interval is not counted in steps."""
        if isinstance(self.refresh_interval, str):
            return None
        if isinstance(self.refresh_interval, int):
            return self.refresh_interval
        return max(1, round(self.refresh_interval * total_steps))


def check_together(block: ICAConfig) -> None:
    """Raise ValueError for keys that do not go with each other."""
    if block.holdout is None and block.weights is None:
        raise ValueError("`holdout` is required: a path, a hub id or a dataset entry (or give `weights`)")
    if block.epoch_share < 1 and block.apply == "gradient":
        raise ValueError("`epoch_share` below 1 goes with `apply: sample`: set that, or remove it")
    named = "drop_tokens" in block.model_fields_set and block.drop_tokens is not None
    if named and (block.weights is not None or block.budget is not None):
        other = "weights" if block.weights is not None else "budget"
        raise ValueError(f"`drop_tokens` needs every row scored, and with `{other}` that is not so; remove one of them")
    if block.budget is not None and (block.score not in ("auto", "ica") or len(block.sets) > 1):
        raise ValueError("`budget` goes with `score: ica` and one holdout alone; remove it, or the others")
    implied = [name for key, name in IMPLIED_WEIGHTINGS.items() if key in block.model_fields_set]
    if block.weighting == "auto" and len(implied) > 1:
        raise ValueError(f"the keys of several weightings are given ({', '.join(implied)}); say which one with `weighting`")
    if (
        block.weighting == "band"
        and len(block.sets) > 1
        and block.score != "auto"
        and BAND_SCORERS.keys() & {name for _, name in parse_score(block.score)}
    ):
        raise ValueError(f"`weighting: band` with `score: {block.score}` goes with one holdout alone; with several use `top`")


def parse_config(block: Any) -> ICAConfig:
    """Validate an `ica:` block.

    Args:
        block: what stands under `ica:` in the user's file, or an ICAConfig.

    Raises:
        ICAError: one line per wrong key, with the key, the value and what is allowed.
    """
    if isinstance(block, ICAConfig):
        return block
    if not isinstance(block, dict):
        raise ICAError(f"`ica:` is {block!r}, but it must be a block of keys with at least `holdout: <path>`.")
    try:
        return ICAConfig(**block)
    except ValidationError as error:
        raise ICAError(describe_errors(error)) from None


def describe_errors(error: ValidationError) -> str:
    """A pydantic error as lines `ica.key: value: what is allowed`, one per key."""
    lines: dict[str, str] = {}
    for item in error.errors():
        # What follows a key names a member of a union, or an item of a list; in a block of its own, the key there.
        depth = 2 if item["loc"][:1] in (("holdout_adapter",), ("influence",)) else 1
        key = ".".join(["ica", *(str(part) for part in item["loc"][:depth])])
        message = item["msg"].removeprefix("Value error, ")
        value = "" if len(item["loc"]) == 0 else f" {item['input']!r}:"
        # A union reports one error per member; the key is what the user needs, once.
        lines.setdefault(key, f"{key}:{value} {message}")
    return "\n".join(lines.values())
