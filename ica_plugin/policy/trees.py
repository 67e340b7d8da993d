"""Sequences that begin alike as one tree of tokens, in which every shared beginning stands once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MAX_SEQUENCES = 512


@dataclass(frozen=True)
class Tree:
    """Several sequences in one buffer of T tokens; a token attends to its own path from the root alone.

    Attributes:
        tokens: int64 [T]; a token stands after its parent.
        positions: int64 [T]; position of each token along its path, from 0.
        paths: per sequence, int64 [length]: where in the buffer its tokens stand.
        ends: int64 [T]: what is below a token in the tree stands right behind it in the buffer, up to here. So the token at
            q attends to the one at k where k ≤ q < ends[k].
        segments: per sequence, (start, stop): the tokens that it added to the buffer, the end of its path; the rest
            of the path is shared with sequences before it.
    """

    tokens: np.ndarray
    positions: np.ndarray
    paths: list[np.ndarray]
    ends: np.ndarray
    segments: list[tuple[int, int]]

    @property
    def is_path(self) -> bool:
        """Nothing branches: every token attends to all before it, as in an ordinary row."""
        return bool((self.ends == len(self.tokens)).all())


def grow(sequences: list[np.ndarray]) -> Tree:
    """The tree of sequences that come sorted, so that each shares most with the one before it.

    Args:
        sequences: int64 [length] tokens each, in the order of `split_into_trees`.
    """
    tokens, positions, paths, segments = [], [], [], []
    ends = np.zeros(sum(map(len, sequences)), np.int64)
    size = 0
    before = path = np.zeros(0, np.int64)
    for sequence in sequences:
        shared = common_prefix(before, sequence)
        new = len(sequence) - shared
        ends[path[shared:]] = size
        path = np.concatenate([path[:shared], np.arange(size, size + new)])
        tokens.append(sequence[shared:])
        positions.append(np.arange(shared, len(sequence)))
        paths.append(path)
        segments.append((size, size + new))
        size += new
        before = sequence
    ends[path] = size
    return Tree(np.concatenate(tokens), np.concatenate(positions), paths, ends[:size], segments)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of tokens with which both begin."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def split_into_trees(
    sequences: list[np.ndarray],
    predictions: np.ndarray,
    *,
    cost: Callable[[np.ndarray], np.ndarray],
    max_tokens: int,
    max_predictions: int,
) -> list[list[int]]:
    """Divide sequences into trees so that the summed cost is least.

    In lexicographic order sequences with a common beginning are neighbours, whatever its length, so trees are runs of
    that order and a shortest path over the cuts finds the best division.

    Args:
        sequences: n token arrays.
        predictions: int [n]; positions at which each needs logits.
        cost: cost of a tree by its number of tokens, vectorised.
        max_tokens: tokens per tree; a longer sequence is a tree of its own.
        max_predictions: the same for logit positions.

    Returns:
        indices of the sequences of each tree, in the order that `grow` takes.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">u4").tobytes())
    ordered = [sequences[i] for i in order]
    lengths = np.array([len(s) for s in ordered])
    shared = np.array([0] + [common_prefix(a, b) for a, b in zip(ordered, ordered[1:])])
    added = np.cumsum(lengths - shared)
    needed = np.concatenate([[0], np.cumsum(predictions[order])])
    n = len(ordered)
    best, cut = np.zeros(n + 1), np.zeros(n + 1, int)
    first = 0
    for stop in range(1, n + 1):
        # Trees over [start, stop) for every start that fits; a longer tree never fits again, so `first` only grows.
        start = np.arange(max(first, stop - MAX_SEQUENCES), stop)
        tokens = lengths[start] + added[stop - 1] - added[start]
        fits = (tokens <= max_tokens) & (needed[stop] - needed[start] <= max_predictions)
        fits[-1] = True
        start, tokens = start[fits], tokens[fits]
        total = best[start] + cost(tokens)
        choice = int(total.argmin())
        best[stop], cut[stop] = total[choice], start[choice]
        first = start[0]
    trees, stop = [], n
    while stop:
        trees.append([order[i] for i in range(cut[stop], stop)])
        stop = cut[stop]
    return trees[::-1]
