"""What scored rows say about the rows that were not scored."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from ..config import ICAConfig
from ..data.store import Example, Rows, Sequence
from .pool import Pool
from .weights import Weights, limited, weights_from_scores

WIDTH = 256


# Smooth inverse frequency, Arora et al. 2017.
FREQUENCY = 1e-3


NEIGHBOURS = 8


ROWS_PER_BLOCK = 4096


# Scored rows that the others have to predict, to tell how well they do.
FEWEST_LEFT_OUT, MOST_LEFT_OUT = 64, 512


@torch.no_grad()
def row_features(embedding: nn.Embedding, rows: Rows | list[Example]) -> np.ndarray:
    """What makes rows neighbours, without a forward: the policy's own input embeddings, averaged over the prompt and over
    each response with rare tokens counting more, and centred; and the number of supervised tokens.

    Args:
        embedding: the policy's input embedding [V, H].
        rows: n rows.

    Returns:
        float32 [n, F]; the inner product of two rows is their similarity.
    """
    table = embedding.weight
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(table.shape[1], WIDTH, generator=generator) / WIDTH**0.5  # keeps inner products, costs less
    table = (table @ directions.to(table)).float()
    counts = np.zeros(len(table))
    for start in range(0, len(rows), ROWS_PER_BLOCK):  # a vocabulary is longer than a row
        tokens = [row.demonstration.tokens for row in rows[start : start + ROWS_PER_BLOCK]]
        counts += np.bincount(np.concatenate(tokens), minlength=len(table))
    rarity = FREQUENCY / (FREQUENCY + counts / counts.sum())
    table = table * torch.from_numpy(rarity).to(table)[:, None]
    parts = [_means(table, [row.demonstration.prompt for row in rows])]
    for i in range(len(rows[0].sequences)):
        parts.append(_means(table, [_response(row.sequences[i]) for row in rows]))
    length = np.log1p([row.supervised_tokens for row in rows])[:, None].astype(np.float32)
    parts.append((length - length.mean()) / max(length.std(), 1e-6))
    return np.concatenate([*map(_unit, parts[:-1]), parts[-1]], axis=1)


def _response(sequence: Sequence) -> np.ndarray:
    return sequence.tokens[sequence.scored] if sequence.scored.any() else sequence.tokens


def _means(table: torch.Tensor, rows: list[np.ndarray]) -> np.ndarray:
    blocks = []
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        block = rows[start : start + ROWS_PER_BLOCK]
        tokens = torch.from_numpy(np.concatenate(block)).to(table.device)
        starts = torch.from_numpy(np.cumsum([0, *(len(row) for row in block[:-1])])).to(table.device)
        blocks.append(nn.functional.embedding_bag(tokens, table, starts, mode="mean").cpu().numpy())
    means = np.concatenate(blocks)
    return means - means.mean(axis=0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class Neighbours:
    """Newest scores of the rows scored so far, and what they say about other rows.

    What `weigh` costs depends on the rows that it weighs, not on how many were ever scored: at most `NEWEST + SAMPLED` of those
    speak for the others.

    Args:
        features: float32 [n, F], a line per train row.
        tokens: int [n], supervised tokens.
        config: the block.
        by_token: the host's loss averages over tokens.
    """

    def __init__(self, features: np.ndarray, tokens: np.ndarray, config: ICAConfig, by_token: bool):
        self._features, self._tokens, self._config, self._by_token = features, tokens, config, by_token
        self._scores = np.full(len(tokens), np.nan)
        self._known = np.zeros(len(tokens), bool)
        self._neutral = np.zeros(len(tokens), bool)
        self._pool = Pool(config.seed)
        self._correlation: float | None = None
        self._stale = False

    def add(self, rows: np.ndarray, scores: np.ndarray, neutral: np.ndarray) -> None:
        """Newly scored rows; `neutral`: rows that could be shown no demonstration."""
        self._scores[rows], self._known[rows], self._neutral[rows] = scores, True, neutral
        self._pool.add(rows[~neutral])
        self._stale = self._stale or len(rows) > 0

    def weigh(self, rows: np.ndarray) -> tuple[Weights, float | None]:
        """Weights of `rows`, mean 1 over them.

        A scored row has the weight that it has among the scored rows of `rows` and those that speak for others; any other the
        mean weight of its nearest of the latter.

        Returns:
            the weights, and how well neighbours predict: the rank correlation of a scored row's weight with the one
            that the other scored rows suggest for it, over a sample; None where there are too few to tell.
        """
        pool, scored = self._pool.rows, self._known[rows]
        known = np.union1d(pool, rows[scored])
        own = weights_from_scores(
            self._scores[known],
            self._config,
            tokens=self._tokens[known],
            by_token=self._by_token,
            neutral=self._neutral[known],
            rows=known,
        )
        at = np.searchsorted(known, pool)
        teaching = ~own.bad[at] & ~self._neutral[pool] & (self._tokens[pool] > 0)
        teachers, taught = pool[teaching], own.values[at[teaching]]
        values, bad = np.ones(len(rows)), np.zeros(len(rows), bool)
        values[~scored] = self._suggest(rows[~scored], teachers, taught)
        at = np.searchsorted(known, rows[scored])
        values[scored], bad[scored] = own.values[at], own.bad[at]
        if self._stale:
            self._correlation, self._stale = self._leave_one_out(teachers, taught, len(rows)), False
        return self._scaled(rows, values, bad), self._correlation

    def _scaled(self, rows: np.ndarray, values: np.ndarray, bad: np.ndarray) -> Weights:
        """Mean 1 over the rows with supervised tokens, of which bad ones have weight 0."""
        tokens = self._tokens[rows]
        share = tokens.astype(np.float64) if self._by_token else (tokens > 0).astype(np.float64)
        values, clipped, weighed = np.where(tokens > 0, values, 0.0), np.zeros(len(rows), bool), (tokens > 0) & ~bad
        if values.any():
            if self._config.weighting == "softmax":
                with np.errstate(divide="ignore"):
                    exponents = np.log(values[weighed])
                values[weighed], clipped[weighed] = limited(exponents, share[weighed], share.sum(), self._config.max_weight)
            else:
                values *= share.sum() / (values * share).sum()
        return Weights(values, clipped, bad)

    def _suggest(self, rows: np.ndarray, pool: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """float64 [rows]: mean weight of each row's nearest others in the pool; 1 where there are none."""
        suggested = np.ones(len(rows))
        count = min(NEIGHBOURS, len(pool) - 1)
        if count <= 0:
            return suggested
        for start in range(0, len(rows), ROWS_PER_BLOCK):
            block = rows[start : start + ROWS_PER_BLOCK]
            distance = _distances(self._features[block], self._features[pool])
            distance[block[:, None] == pool[None]] = np.inf
            nearest = np.argpartition(distance, count - 1, axis=1)[:, :count]
            suggested[start : start + len(block)] = weights[nearest].mean(axis=1)
        return suggested

    def _leave_one_out(self, pool: np.ndarray, weights: np.ndarray, weighed: int) -> float | None:
        if len(pool) <= NEIGHBOURS:
            return None
        # As many as were weighed, so that telling how good the neighbours are costs no more than asking them.
        count = min(len(pool), max(FEWEST_LEFT_OUT, min(weighed, MOST_LEFT_OUT)))
        sample = np.sort(np.random.default_rng(self._config.seed).choice(len(pool), count, replace=False))
        suggested, true = self._suggest(pool[sample], pool, weights), weights[sample]
        if np.ptp(suggested) == 0 or np.ptp(true) == 0:
            return None
        return float(spearmanr(suggested, true).statistic)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
