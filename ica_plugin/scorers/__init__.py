"""Log-probs of rows under the policy (`engine`), and the scores made from them (one file per scorer)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..config import ICAConfig
from ..expression import parse_score, parts_of
from ..policy.losses import token_means
from .combine import balanced, combined
from .context import Scorer, ScoringContext
from .control import random
from .datainf import datainf
from .holdout_adapter import rho
from .influence import influence, truncated
from .irm import irm
from .likelihood import likelihood
from .one_shot import one_shot
from .rds import rds

CONTRACT_COLUMNS = ("row", "base", "context", "score", "scored")


# Scores of one scorer for the rows of a context; docs/scorers.md has what each costs and where it is defined.
SCORER_FUNCTIONS: dict[str, Scorer] = {
    "ica": lambda context: context.ica.score,
    "likelihood": likelihood,
    "one_shot": one_shot,
    "rho": rho,
    "lossdiff": rho,
    "irm": irm,
    "influence": influence,
    "datainf": datainf,
    "rds": rds,
    "random": random,
}


def scores_for(context: ScoringContext) -> dict[str, np.ndarray]:
    """Every scorer that `score:` names, for the rows of a context.

    What depends on all rows scored together (ranks, bands, truncation) is left to `total_score`, so that each process may
    score a share of the rows.

    Returns:
        float64 [n] by name: `base` and `context` (log-probs without and with demonstrations as in `ica.Scores`, NaN where no
        scorer needed them), and one per scorer.

    Raises:
        ICAError: a scorer is not defined for these rows or this policy.
    """
    context.parts = parts_of(parse_score(context.config.score))
    parts = {name: SCORER_FUNCTIONS[name](context) for name in context.parts}
    nothing = np.full(len(context.rows), np.nan)
    if "ica" in context.parts:
        return {"base": context.ica.base, "context": context.ica.context, **parts}
    return {"base": _base(context) if "sums" in vars(context) else nothing, "context": nothing, **parts}


def _base(context: ScoringContext) -> np.ndarray:
    if context.length_normalize:
        return token_means(context.sums, context.examples)
    return context.sums[:, 0] - context.sums[:, 1] if context.kind == "pair" else context.sums[:, 0]


def total_score(config: ICAConfig, columns: dict[str, np.ndarray]) -> np.ndarray:
    """The one score of each row of the set S scored together: truncation, middle bands, and sums of ranks or z-scores.

    Args:
        config: `score`, `combine`, `band`, `influence.truncate`.
        columns: float64 [n] by name, as `scores_for` returns them, for all of S.

    Returns:
        float64 [n]; NaN where a scorer has none.
    """
    terms = parse_score(config.score)
    parts = {name: columns[name] for name in parts_of(terms)}
    if "influence" in parts:
        parts["influence"] = truncated(parts["influence"], config.influence.truncate)
    return combined(terms, parts, combine=config.combine, band=config.band)


def scores_for_sets(context: ScoringContext) -> dict[str, np.ndarray]:
    """`scores_for` against each holdout set apart, the columns of a named set as `scorer:set`.

    Returns:
        float64 [n] by name; `base` and `context` are means over the sets.
    """
    if list(context.holdout.sets) == [""]:
        return scores_for(context)
    found: dict[str, dict[str, np.ndarray]] = {}
    shared: dict[str, np.ndarray] = {}
    for name, shown in context.holdout.sets.items():
        mine = set(shown)
        alone = replace(
            context,
            holdout=context.holdout.only(name),
            kept=context.kept.setdefault(name, {}),
            demonstrations=[[d for d in demonstrations if d in mine] for demonstrations in context.demonstrations],
        )
        vars(alone).update(shared)  # log-probs of the rows without demonstrations are the same for every set
        found[name] = scores_for(alone)
        shared = {key: vars(alone)[key] for key in ("sums", "reference_sums") if key in vars(alone)}
    columns = {key: np.mean([part[key] for part in found.values()], axis=0) for key in ("base", "context")}
    return columns | {f"{key}:{name}": part[key] for name, part in found.items() for key in part if key not in columns}


def balanced_score(config: ICAConfig, columns: dict[str, np.ndarray]) -> np.ndarray:
    """`total_score` against each holdout set, normalised (`combine`) and made one (`balance`).

    Args:
        config: the block.
        columns: float64 [n] by name, as `scores_for_sets` returns them, for all rows scored together.
    """
    names = list(config.sets)
    if names == [""]:
        return total_score(config, columns)
    of_sets = [
        {key.removesuffix(f":{name}"): column for key, column in columns.items() if key.endswith(f":{name}")} for name in names
    ]
    return balanced([total_score(config, part) for part in of_sets], config.balance, config.combine)
