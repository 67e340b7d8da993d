"""The text under `score:` → scorers and factors. The names stand here, so that reading a config imports no scorer (nor torch)."""

from __future__ import annotations

import difflib
import math
import re
from typing import Literal

from .errors import ICAError

SCORERS = (
    "ica",
    "likelihood",
    "one_shot",
    "rho",
    "lossdiff",
    "irm",
    "ica-irm",
    "lossdiff-irm",
    "influence",
    "datainf",
    "rds",
    "random",
)

# Scorers that look at a row's demonstrations; the others need no retrieval.
SHOWS_DEMONSTRATIONS = {"ica", "one_shot"}

# Pairs that both scorers place in the middle band are kept (arXiv 2510.13212).
BAND_SCORERS = {"ica-irm": ("ica", "irm"), "lossdiff-irm": ("lossdiff", "irm")}

Combine = Literal["rank", "zscore"]
Balance = Literal["mean", "max", "round_robin"]

Terms = tuple[tuple[float, str], ...]

_TERM = re.compile(
    r"\s*(?P<sign>[+-]?)\s*(?:(?P<factor>[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*\*\s*)?(?P<name>[A-Za-z_][\w-]*)\s*(?=[+-]|$)"
)


def parse_score(text: str) -> Terms:
    """`"ica - 0.5*likelihood"` → `((1.0, "ica"), (-0.5, "likelihood"))`.

    Names have hyphens, so a minus between two names stands between spaces.

    Raises:
        ICAError: not a sum of `[factor*]name`, an unknown or repeated name, a factor that is 0 or no number, or one below 0 before
            a score that is a band.
    """
    terms: list[tuple[float, str]] = []
    position = 0
    while position < len(text) or not terms:
        match = _TERM.match(text, position)
        if match is None or (terms and not match["sign"]):
            raise ICAError(
                f"`{text[position:].strip()}` is not a scorer; give a name or a sum of names as in `ica + likelihood` or "
                "`ica - 0.5*likelihood`"
            )
        terms.append((_factor(match), _known(match["name"])))
        position = match.end()
    names = [name for _, name in terms]
    if len(set(names)) < len(names):
        raise ICAError("a scorer stands in the sum twice; give each once, with a factor")
    for factor, name in terms:
        if factor < 0 and name in BAND_SCORERS:
            raise ICAError(
                f"`{name}` is how deep in the middle of two scores a row lies, which has no other side; give it no minus"
            )
    return tuple(terms)


def _known(name: str) -> str:
    if name in SCORERS:
        return name
    if "-" in name and set(name.split("-")) <= set(SCORERS):
        raise ICAError(f"`{name}` is read as one name; to subtract, write `{' - '.join(name.split('-'))}`")
    near = difflib.get_close_matches(name, SCORERS, n=1, cutoff=0.4)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise ICAError(f"unknown scorer `{name}`: {hint}Known scorers: {', '.join(SCORERS)}")


def _factor(match: re.Match[str]) -> float:
    try:
        size = float(match["factor"] or 1)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise ICAError(f"the factor `{match['factor']}` of `{match['name']}` must be a number, and not 0")
    return -size if match["sign"] == "-" else size


def parts_of(terms: Terms) -> list[str]:
    """Names of the scorers to compute, each once: band scorers are made from two others."""
    return list(dict.fromkeys(part for _, name in terms for part in BAND_SCORERS.get(name, (name,))))
