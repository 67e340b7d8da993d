"""The control: scores that know nothing."""

from __future__ import annotations

import hashlib

import numpy as np

from .context import ScoringContext
from .needs import Needs

NAME = "random"
SOURCE = "a control"
NEEDS = Needs()


def score(context: ScoringContext) -> np.ndarray:
    """Uniform in [0, 1), decided by the row's tokens and `seed` alone: no other row, order, rank or refresh changes it.

    Returns:
        float64 [n].
    """
    seed = context.config.seed
    values = []
    for row in context.whole:
        key = b"".join(sequence.digest.encode() for sequence in row.sequences)
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        values.append(np.random.default_rng([seed, number]).random())
    return np.array(values)
