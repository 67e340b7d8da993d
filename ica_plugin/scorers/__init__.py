"""One file per scorer, and the scores of a run made from them.

Every scorer is a module with a `NAME`, a `SOURCE` (where it is defined), its `NEEDS`, and `score(context)` → float64 [n], a
higher score being a better row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from torch import nn

from ..config import ICAConfig
from ..data.store import Kind
from ..expression import BAND_SCORERS, parse_score, parts_of
from ..policy.losses import difference, token_means
from ..policy.reference import Reference
from . import datainf, ica, influence, irm, likelihood, lossdiff, one_shot, random, rds, rho
from .combine import balanced, combined, on_one_scale, without_spread
from .context import ScoringContext
from .influence import truncated
from .needs import Needs, require_met

# What is no scorer's among the columns of a scoring. The last holds a float32 array for each row, with `drop_tokens`.
CONTEXT_TOKENS = "context_tokens"
CONTRACT_COLUMNS = ("row", "base", "context", "score", "scored", CONTEXT_TOKENS)

# docs/scorers.md has what each costs. The names alone, for whoever must not import torch, are in `expression`.
REGISTRY = {module.NAME: module for module in (ica, likelihood, one_shot, rho, lossdiff, irm, influence, datainf, rds, random)}


def needs_of(names: Iterable[str]) -> dict[str, Needs]:
    """What each of the scorers `names` needs; the two of a band scorer each."""
    return {part: REGISTRY[part].NEEDS for name in names for part in BAND_SCORERS.get(name, (name,))}


def require(names: Iterable[str], model: nn.Module, kind: Kind, reference: Reference = Reference()) -> None:
    """Raise where a run does not have what its scorers need; may be asked before anything is scored.

    Args:
        names: of scorers, as in `parts_of(parse_score(…))`.
        model: the policy.
        kind: of the train rows.
        reference: the run's reference model.

    Raises:
        ICAError: what is missing, for which scorer, and what to do.
    """
    require_met(needs_of(names), model, kind, reference)


def scores_for(context: ScoringContext) -> dict[str, np.ndarray]:
    """Every scorer that `score:` names, for the rows of a context.

    What depends on all rows scored together (ranks, bands, truncation) is left to `total_score`, so that each process may
    score a share of the rows.

    Returns:
        float64 [n] by name: `base` and `context` (log-probs without and with demonstrations as in `ica.Scores`, NaN where no
        scorer needed them), and one per scorer; with `drop_tokens` also `context_tokens`, the log-probs of each row's supervised
        tokens after its demonstrations.

    Raises:
        ICAError: a scorer is not defined for these rows or this policy.
    """
    context.parts = parts_of(parse_score(context.config.score))
    require(context.parts, context.engine.model, context.kind, context.reference)
    with context.engine.undisturbed():  # once for all of them
        parts = {name: REGISTRY[name].score(context) for name in context.parts}
        if context.config.drop_tokens is not None:
            parts[CONTEXT_TOKENS] = _objects(context.ica.tokens)
    nothing = np.full(len(context.rows), np.nan)
    if "ica" in context.parts:
        return {"base": context.ica.base, "context": context.ica.context, **parts}
    return {"base": _base(context) if "sums" in vars(context) else nothing, "context": nothing, **parts}


def _base(context: ScoringContext) -> np.ndarray:
    if context.length_normalize:
        return token_means(context.sums, context.examples)
    return difference(context.sums)


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


def scorers_without_spread(columns: dict[str, np.ndarray]) -> list[str]:
    """Names of the scorers (`scorer:set` with several sets) that gave every row the same score, as `scores_for_sets` has them."""
    return without_spread({name: column for name, column in columns.items() if name not in CONTRACT_COLUMNS})


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
            once=context.once.setdefault(name, {}),
            demonstrations=[[d for d in demonstrations if d in mine] for demonstrations in context.demonstrations],
        )
        vars(alone).update(shared)  # log-probs of the rows without demonstrations are the same for every set
        found[name] = scores_for(alone)
        shared = {key: vars(alone)[key] for key in ("sums", "reference_sums") if key in vars(alone)}
    columns = {key: np.mean([part[key] for part in found.values()], axis=0) for key in ("base", "context")}
    if context.config.drop_tokens is not None:
        # A token is surprising if it is so after the good examples of every set.
        by_row = zip(*(part[CONTEXT_TOKENS] for part in found.values()), strict=True)
        columns[CONTEXT_TOKENS] = _objects([most_likely(row) for row in by_row])
    return columns | {f"{key}:{name}": part[key] for name, part in found.items() for key in part if key not in columns}


def most_likely(of_sets: Iterable[np.ndarray]) -> np.ndarray:
    """Of the log-probs of a row's tokens after the demonstrations of several sets, float32 [tokens] each, the highest of each token.

    A set of which the row is shown nothing has none.
    """
    known = [values for values in of_sets if len(values)]
    return np.max(known, axis=0) if known else np.zeros(0, np.float32)


def _objects(arrays: list[np.ndarray]) -> np.ndarray:
    column = np.empty(len(arrays), object)
    column[:] = arrays
    return column


def balanced_score(config: ICAConfig, columns: dict[str, np.ndarray]) -> np.ndarray:
    """`total_score` against each holdout set, normalised (`combine`) and made one (`balance`).

    Args:
        config: the block.
        columns: float64 [n] by name, as `scores_for_sets` returns them, for all rows scored together.
    """
    if list(config.sets) == [""]:
        return total_score(config, columns)
    return balanced(_of_sets(config, columns), config.balance, config.combine)


def weight_shares(config: ICAConfig, columns: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
    """What share of the weight each holdout set drew to itself: that of the rows that are best for it, its scores on one scale.

    Args:
        config: the block.
        columns: as of `balanced_score`.
        weights: float64 [n], of the rows.

    Returns:
        by the set's name, 1 in all; {} where there is one holdout without a name, or no row with a score.
    """
    names = list(config.sets)
    if names == [""]:
        return {}
    grid = on_one_scale(_of_sets(config, columns), config.combine)
    known = np.isfinite(grid).any(axis=0)
    drawn = np.bincount(grid[:, known].argmax(axis=0), weights[known], minlength=len(names))
    return {name: float(share) for name, share in zip(names, drawn / drawn.sum(), strict=True)} if drawn.sum() else {}


def _of_sets(config: ICAConfig, columns: dict[str, np.ndarray]) -> list[np.ndarray]:
    """`total_score` against each named set."""
    of_sets = [
        {key.removesuffix(f":{name}"): column for key, column in columns.items() if key.endswith(f":{name}")}
        for name in config.sets
    ]
    return [total_score(config, part) for part in of_sets]
