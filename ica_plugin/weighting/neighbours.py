"""What scored rows say about the rows that were not scored."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from ..config import ICAConfig
from ..data.store import Example, Sequence
from .weights import Weights, scaled_to_mean_one, weights_from_scores

WIDTH = 256


# Smooth inverse frequency, Arora et al. 2017.
FREQUENCY = 1e-3


NEIGHBOURS = 8


ROWS_PER_BLOCK = 4096


@torch.no_grad()
def row_features(embedding: nn.Embedding, rows: list[Example]) -> np.ndarray:
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
    for row in rows:
        counts += np.bincount(row.demonstration.tokens, minlength=len(table))
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

    Args:
        features: float32 [n, F], a line per train row.
        tokens: int [n], supervised tokens.
        config: the block.
        by_token: the host's loss averages over tokens.
    """

    def __init__(self, features: np.ndarray, tokens: np.ndarray, config: ICAConfig, by_token: bool):
        self._features, self._tokens, self._config, self._by_token = features, tokens, config, by_token
        self._scores: dict[int, float] = {}
        self._neutral: set[int] = set()

    def add(self, rows: np.ndarray, scores: np.ndarray, neutral: np.ndarray) -> None:
        """Newly scored rows; `neutral`: rows that could be shown no demonstration."""
        self._scores.update(zip(rows.tolist(), scores.tolist(), strict=True))
        self._neutral |= set(rows[neutral].tolist())

    def weigh(self, rows: np.ndarray) -> tuple[Weights, float | None]:
        """Weights of `rows`, mean 1 over them.

        A scored row has the weight that it has among all rows scored so far; any other the mean weight of its nearest
        scored rows.

        Returns:
            the weights, and how well neighbours predict: the rank correlation of each scored row's weight with the one
            that the other scored rows suggest for it; None where there are too few to tell.
        """
        known = np.array(sorted(self._scores), dtype=np.int64)
        neutral = np.isin(known, list(self._neutral))
        own = weights_from_scores(
            np.array([self._scores[row] for row in known]),
            self._config,
            tokens=self._tokens[known],
            by_token=self._by_token,
            neutral=neutral,
        )
        teaching = ~own.bad & ~neutral & (self._tokens[known] > 0)
        pool, pool_weights = known[teaching], own.values[teaching]
        values = self._suggest(rows, pool, pool_weights)
        bad, clipped = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        at = np.searchsorted(known, rows)
        scored = np.isin(rows, known)
        values[scored], bad[scored] = own.values[at[scored]], own.bad[at[scored]]
        values[self._tokens[rows] == 0] = 0.0
        counted = self._tokens[rows] > 0
        share = self._tokens[rows].astype(np.float64) if self._by_token else counted.astype(np.float64)
        if values.any():
            limit = self._config.max_weight if self._config.weighting == "softmax" else np.inf
            values, clipped = scaled_to_mean_one(values, share, float(share.sum()), limit)
        return Weights(values, clipped, bad), self._leave_one_out(pool, pool_weights)

    def _suggest(self, rows: np.ndarray, pool: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """float64 [rows]: mean weight of each row's nearest others in the pool; 1 where there are none."""
        suggested = np.ones(len(rows))
        for start in range(0, len(rows), ROWS_PER_BLOCK):
            block = rows[start : start + ROWS_PER_BLOCK]
            distance = _distances(self._features[block], self._features[pool])
            distance[block[:, None] == pool[None]] = np.inf
            count = min(NEIGHBOURS, len(pool) - 1)
            if count > 0:
                nearest = np.argpartition(distance, count - 1, axis=1)[:, :count]
                suggested[start : start + len(block)] = weights[nearest].mean(axis=1)
        return suggested

    def _leave_one_out(self, pool: np.ndarray, weights: np.ndarray) -> float | None:
        if len(pool) <= NEIGHBOURS:
            return None
        suggested = self._suggest(pool, pool, weights)
        if np.ptp(suggested) == 0 or np.ptp(weights) == 0:
            return None
        return float(spearmanr(suggested, weights).statistic)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
