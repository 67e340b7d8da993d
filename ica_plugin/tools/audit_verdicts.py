"""What an audit's numbers say in words, each with its evidence and how far chance goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import yaml

from ..expression import parse_score, parts_of
from .page import Verdict, duration

Numbers = dict[str, Any]

ENOUGH = 0.7  # rank correlation of the two halves of a holdout, from which on it is called large enough
HALVES = "one half of the holdout against the other"
# Scorers that never look at the holdout: what they tell apart says nothing of the target.
WITHOUT_HOLDOUT = {"likelihood", "random"}


def verdicts(numbers: Numbers) -> list[Verdict]:
    """The verdicts for what `audit_numbers` returns."""
    return [block(numbers), *holdout(numbers), *cost(numbers)]


def block(numbers: Numbers) -> Verdict:
    """Which score suits this data: the config's own, unless another one tells planted noise from clean rows better than chance allows."""
    own = numbers["data"]["score of the config"]
    if not numbers["noise"]:
        return Verdict(
            f"Keep `score: {own}`.",
            "No noise could be planted in so few rows, so no scorer was put to the test.",
            _block(numbers, own),
        )
    of_score = {name: _mean_auroc(numbers, name) for name in numbers["values"] if _looks_at_holdout(name)}
    known = {name: value for name, value in of_score.items() if value is not None}
    chance = _chance(numbers)
    kinds = f"over {len(numbers['noise'])} kinds of planted noise; 0.5 is blind, and chance goes to ± {chance:.2f}"
    if own not in known:
        return Verdict(f"`score: {own}` gave no row a score.", f"AUROC {kinds}.")
    best = max(known, key=lambda name: known[name])
    if known[best] <= 0.5 + chance:
        return Verdict(
            f"Keep `score: {own}`: no score tells the planted noise from clean rows better than chance would.",
            f"The best, `{best}`, has AUROC {known[best]:.2f} ({kinds}).",
            _block(numbers, own),
        )
    # Two scorers on the same rows: their difference spreads less than twice either.
    if known[best] - known[own] > chance:
        return Verdict(
            f"`score: {best}` suits this data better than the config's own.",
            f"It tells corrupted rows from clean ones at AUROC {known[best]:.2f}, `{own}` at {known[own]:.2f} ({kinds}).",
            _block(numbers, best),
        )
    return Verdict(
        f"Keep `score: {own}`.",
        f"It tells corrupted rows from clean ones at AUROC {known[own]:.2f}; no other is better by more than chance ({kinds}).",
        _block(numbers, own),
    )


def holdout(numbers: Numbers) -> list[Verdict]:
    """Whether the holdout is large enough: do its two halves rank the rows alike?"""
    rows, chance = numbers["data"]["rows in the sample"], 2 / np.sqrt(numbers["data"]["rows in the sample"] - 1)
    found = next((line["rank correlation"] for line in numbers["sensitivity"] if line["ICA with"] == HALVES), None)
    size = numbers["data"]["shown as demonstrations"]
    if found is None:
        return [
            Verdict(
                f"The holdout ({size} rows) is too small to be tried by halves.", "Give at least 8 rows; 50 to 500 serve well."
            )
        ]
    evidence = f"Its two halves rank the {rows} sampled rows alike at {found:.2f} (chance: 0 ± {chance:.2f})."
    if found >= ENOUGH:
        return [Verdict(f"The holdout ({size} rows) is large enough.", evidence)]
    return [
        Verdict(
            f"The holdout ({size} rows) is too small, or ICA says little about this data.",
            f"{evidence} Add good rows, or take a score whose AUROC on planted noise is higher.",
        )
    ]


def cost(numbers: Numbers) -> list[Verdict]:
    """What scoring all rows once will take on this machine."""
    own = numbers["data"]["score of the config"]
    seconds = next((line["seconds, alone"] for line in numbers["scores"] if line["scorer"] == own), None)
    if seconds is None:
        return []
    rows, sample = (
        numbers["data"]["train rows"] - numbers["data"]["without supervised tokens"],
        numbers["data"]["rows in the sample"],
    )
    return [
        Verdict(
            f"Scoring all {rows} rows once takes about {duration(seconds * rows / sample)} on this machine.",
            f"{sample} rows took {seconds:.1f} seconds by `{own}`; with a `refresh_interval` it is as many times that.",
        )
    ]


def _mean_auroc(numbers: Numbers, name: str) -> float | None:
    found = [line[name] for line in numbers["noise"] if line.get(name) is not None]
    return float(np.mean(found)) if found else None


def _chance(numbers: Numbers) -> float:
    """Two standard deviations of a blind scorer's mean AUROC; the kinds share their clean rows, so they do not average out."""
    return max(float(line["chance"].removeprefix("0.5 ± ")) for line in numbers["noise"])


def _looks_at_holdout(name: str) -> bool:
    return not set(parts_of(parse_score(name))) <= WITHOUT_HOLDOUT


def _block(numbers: Numbers, score: str) -> str:
    """The block ready to paste; what is the default by itself is left out."""
    block = {"holdout": numbers["data"]["holdout"]}
    if score != numbers["data"]["default score"]:
        block["score"] = score
    return yaml.safe_dump({"ica": block}, sort_keys=False).strip()
