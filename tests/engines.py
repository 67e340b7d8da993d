"""Models, rows and the definition of a log-prob, for tests of the scoring engine."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from ica_plugin.data.store import Sequence
from ica_plugin.policy.engine import Engine
from ica_plugin.policy.packed import PackedPath
from ica_plugin.policy.padded import PaddedPath
from ica_plugin.scorers.in_context import in_context
from tiny import SIZES

CPU = torch.device("cpu")
TINY = SIZES | {"max_position_embeddings": 512}


def make(family: str, seed: int = 0, **settings):
    """A tiny random model of a family of transformers."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **settings})
    return AutoModelForCausalLM.from_config(config).float().eval()


def rows(n: int = 24, seed: int = 0, demonstrations: int = 4) -> list[Sequence]:
    """Base and context sequences of n rows that share a template and draw two of a few demonstrations."""
    rng = np.random.default_rng(seed)
    template = rng.integers(3, 512, size=4)
    context = [np.concatenate([template, rng.integers(3, 512, size=rng.integers(8, 20))]) for _ in range(demonstrations)]
    shown = [Sequence(tokens, np.zeros(len(tokens), bool)) for tokens in context]
    sequences = []
    for _ in range(n):
        tokens = np.concatenate([template, rng.integers(3, 512, size=rng.integers(3, 16))])
        scored = rng.random(len(tokens)) < 0.6  # several turns
        scored[0], scored[-1] = False, True
        row = Sequence(tokens, scored)
        chosen = sorted(rng.choice(demonstrations, 2, replace=False))
        sequences += [row, in_context(row, [shown[i] for i in chosen])]
    return sequences


@torch.no_grad()
def one_at_a_time(model, sequences: list[Sequence]) -> np.ndarray:
    """The definition: one unpadded forward per sequence, float64 log-softmax."""
    values = []
    for sequence in sequences:
        logits = model(input_ids=torch.from_numpy(sequence.tokens)[None]).logits[0]
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        at = np.flatnonzero(sequence.scored)
        values.append(float(logprobs[at - 1, sequence.tokens[at]].sum()))
    return np.array(values)


def engine_with(model, path: str, **settings) -> Engine:
    engine = Engine(model, device=CPU, **settings)
    base = engine._base
    engine._chosen = PaddedPath(model, base, CPU) if path == "padded" else PackedPath(model, base, CPU, path)
    return engine


class listening:
    """The plugin's logger in caplog (it does not propagate)."""

    def __init__(self, caplog):
        from ica_plugin.log import get_logger

        self.logger, self.handler = get_logger(), caplog.handler

    def __enter__(self):
        self.logger.addHandler(self.handler)

    def __exit__(self, *_):
        self.logger.removeHandler(self.handler)
