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

_TERM = re.compile(r"(?:(?P<factor>[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*\*\s*)?(?P<name>[A-Za-z_][\w-]*)")


def parse_score(text: str) -> Terms:
    """`"0.5*ica + likelihood"` → `((0.5, "ica"), (1.0, "likelihood"))`.

    Raises:
        ICAError: not a sum of `[factor*]name`, an unknown or repeated name, or a factor that is not above 0.
    """
    terms = []
    for part in text.split("+"):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise ICAError(
                f"`{part.strip()}` is not a scorer; give a name or a sum of names as in `ica + likelihood` or `0.5*ica + likelihood`"
            )
        name = match["name"]
        if name not in SCORERS:
            near = difflib.get_close_matches(name, SCORERS, n=1, cutoff=0.4)
            hint = f"did you mean `{near[0]}`? " if near else ""
            raise ICAError(f"unknown scorer `{name}`: {hint}Known scorers: {', '.join(SCORERS)}")
        try:
            factor = float(match["factor"] or 1)
        except ValueError:
            factor = 0.0
        if not 0 < factor < math.inf:
            raise ICAError(f"the factor `{match['factor']}` of `{name}` must be a number above 0")
        terms.append((factor, name))
    names = [name for _, name in terms]
    if len(set(names)) < len(names):
        raise ICAError("a scorer stands in the sum twice; give each once, with a factor")
    return tuple(terms)


def parts_of(terms: Terms) -> list[str]:
    """Names of the scorers to compute, each once: band scorers are made from two others."""
    return list(dict.fromkeys(part for _, name in terms for part in BAND_SCORERS.get(name, (name,))))
