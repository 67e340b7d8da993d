"""The methods of the evidence experiments: names, keys of the `ica:` block, and how weights become training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

SUM = "ica + likelihood"
PER_TOKEN = "ica, per token"

# Method → keys of the `ica:` block.
METHODS: dict[str, dict[str, Any]] = {
    "ica": {"score": "ica"},
    "ica, rank": {"score": "ica", "weighting": "rank"},
    "ica, minmax": {"score": "ica", "weighting": "minmax"},
    "likelihood": {"score": "likelihood"},
    SUM: {"score": SUM},
    "one_shot": {"score": "one_shot"},
    "rds": {"score": "rds"},
    "influence": {"score": "influence"},
    "random": {"score": "random"},
}
SFT_METHODS = METHODS | {
    "ica, refreshed": {"score": "ica", "refresh_interval": 0.25},
    f"{SUM}, refreshed": {"score": SUM, "refresh_interval": 0.25},
    f"{SUM}, rank": {"score": SUM, "weighting": "rank"},
    f"{SUM}, top": {"score": SUM, "weighting": "top"},
    f"{SUM}, temperature 0.5": {"score": SUM, "temperature": 0.5},
    f"{SUM}, best third alone": {"score": SUM, "weighting": "top", "keep": 1 / 3},
    "rho": {"score": "rho"},
}
PAIR_METHODS = METHODS | {
    f"{SUM}, best two thirds alone": {"score": SUM, "weighting": "top", "keep": 2 / 3},
    "ica, best two thirds alone": {"score": "ica", "weighting": "top", "keep": 2 / 3},
    "ica, top": {"score": "ica", "weighting": "top"},
    PER_TOKEN: {"score": "ica", "length_normalize": True},
    f"{PER_TOKEN}, rank": {"score": "ica", "length_normalize": True, "weighting": "rank"},
    f"{PER_TOKEN}, top": {"score": "ica", "length_normalize": True, "weighting": "top"},
    f"{PER_TOKEN}, best two thirds alone": {"score": "ica", "length_normalize": True, "weighting": "top", "keep": 2 / 3},
    "lossdiff": {"score": "lossdiff"},
    "ica, refreshed": {"score": "ica", "refresh_interval": 0.5},
    "ica-irm, refreshed": {"score": "ica-irm", "weighting": "top", "refresh_interval": 0.5},
    "lossdiff-irm, refreshed": {"score": "lossdiff-irm", "weighting": "top", "refresh_interval": 0.5},
}
BARE = ("no weighting", "oracle", "good rows alone", "holdout alone")
# The score that each experiment's other ways to train are compared with, and its share of rows that trains best alone.
SCORE = {"preferences": PER_TOKEN, "simpo": "ica"} | dict.fromkeys(("noise", "off-target", "gsm8k", "alpaca"), SUM)
BEST = dict.fromkeys(SCORE, "best third") | dict.fromkeys(("preferences", "simpo"), "best two thirds")
FEWER_SEEDS = 3  # of what is not in `compared`
CLEAN = ("gsm8k", "alpaca")  # where nothing is spoilt


def compared(name: str) -> list[str]:
    """Methods that are run with every seed."""
    score = SCORE[name]
    return [
        "no weighting",
        f"{score}, top, drawn",
        f"{score}, rank, drawn",
        "oracle, drawn",
        f"{score}, drawn",
        f"{score}, top",
        f"{score}, rank",
        score,
        "ica",
        "oracle",
        "good rows alone",
        f"{score}, {BEST[name]} alone",
    ]


def controls(name: str) -> list[str]:
    """Methods that are run with the first three seeds: fewer steps, and other step sizes."""
    score = SCORE[name]
    return [
        f"{score}, top, drawn, half the epoch",
        f"{score}, rank, learning rate / √ESS",
        f"{score}, learning rate / √ESS",
        *(
            f"{method}, learning rate / 3"
            for method in dict.fromkeys(
                ["no weighting", "ica", "oracle", f"{score}, rank", f"{score}, rank, drawn", f"{score}, top, drawn"]
            )
        ),
    ]


LIKELY_CUTS = ("the holdout's 1 %", "the holdout's 2 %", "the lowest 10 %")
OTHER_CUTS = ("the holdout's 0.5 %", "the holdout's 5 %", "the lowest 5 %")


def cuts(name: str) -> list[str]:
    """Methods that leave tokens out of the loss, for SFT, with the first three seeds."""
    return [
        *(f"no weighting, tokens above {threshold}" for threshold in LIKELY_CUTS),
        *(f"no weighting, tokens above {threshold}, without context" for threshold in LIKELY_CUTS),
        *(f"{SCORE[name]}, top, drawn, tokens above {threshold}" for threshold in LIKELY_CUTS),
    ]


def more_cuts(name: str) -> list[str]:
    """The same with the other thresholds."""
    return [
        *(f"no weighting, tokens above {threshold}" for threshold in OTHER_CUTS),
        *(f"{SCORE[name]}, top, drawn, tokens above {threshold}" for threshold in OTHER_CUTS),
    ]


@dataclass(frozen=True)
class Cut:
    """Which supervised tokens get weight 0: those whose log-prob is below a threshold.

    Attributes:
        percent: the quantile that is the threshold.
        of_holdout: of the holdout's own tokens; else of the train rows'.
        in_context: log-probs after the row's demonstrations (a holdout row's: other holdout rows); else without any.
    """

    percent: float
    of_holdout: bool
    in_context: bool


@dataclass(frozen=True)
class Manner:
    """How a method trains with its weights.

    Attributes:
        weighting: the method without what follows: a key of METHODS, or one of BARE.
        drawn: rows are trained as often as their weight says, instead of once with a scaled gradient.
        share: places of the epoch, as a share of the rows.
        divisor: of the learning rate; None: the square root of the weights' effective sample size.
        cut: tokens left out of the loss, if any are.
    """

    weighting: str
    drawn: bool = False
    share: float = 1.0
    divisor: float | None = 1.0
    cut: Cut | None = None


ENDINGS: dict[str, dict[str, Any]] = {
    ", drawn": {"drawn": True},
    ", half the epoch": {"share": 0.5},
    ", learning rate / 3": {"divisor": 3.0},
    ", learning rate / √ESS": {"divisor": None},
}

CUT = re.compile(
    r"(?P<method>.*), tokens above (?P<of>the holdout's|the lowest) (?P<percent>[\d.]+) %(?P<bare>, without context)?"
)


def manner_of(method: str) -> Manner:
    """What the endings of a method's name say."""
    found: dict[str, Any] = {}
    if cut := CUT.fullmatch(method):
        method = cut["method"]
        found["cut"] = Cut(float(cut["percent"]), cut["of"] == "the holdout's", cut["bare"] is None)
    while ending := next((ending for ending in ENDINGS if method.endswith(ending)), None):
        found |= ENDINGS[ending]
        method = method.removesuffix(ending)
    return Manner(method, **found)


def baseline_of(method: str) -> str:
    """What a method's gain is over: no weighting, at the same learning rate where that was given."""
    ending = ", learning rate / 3"
    return f"no weighting{ending if method.endswith(ending) else ''}"
