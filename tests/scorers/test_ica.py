"""ICA against its formula."""

from __future__ import annotations

import numpy as np
import pytest

from engines import CPU, engine_with, one_at_a_time
from ica_plugin.data.store import Example, Sequence
from ica_plugin.policy.engine import Engine
from ica_plugin.policy.memory import Budget
from ica_plugin.scorers.in_context import ica_scores, in_context
from tiny import make_model


def examples_and_demonstrations(kind: str, n: int = 12):
    rng = np.random.default_rng(3)

    def sequence(prompt):
        tokens = np.concatenate([prompt, rng.integers(3, 512, size=rng.integers(3, 9))])
        return Sequence(tokens, np.arange(len(tokens)) >= len(prompt))

    def example():
        prompt = rng.integers(3, 512, size=6)
        return Example(
            tuple(sequence(prompt) for _ in range(2 if kind == "pair" else 1)),
            kind,
            kind != "unpaired" or bool(rng.random() < 0.5),
        )

    holdout = [example() for _ in range(5)]
    return [example() for _ in range(n)], [sorted(rng.choice(5, 3, replace=False).tolist()) for _ in range(n)], holdout


@pytest.mark.parametrize("kind", ["sft", "pair", "unpaired"])
@pytest.mark.parametrize("length_normalize", [False, True])
def test_scores_by_both_paths_are_the_formula(kind, length_normalize):
    model = make_model().eval()
    examples, demonstrations, holdout = examples_and_demonstrations(kind)
    for path in ("segments", "dense", "padded"):
        scores = ica_scores(engine_with(model, path), examples, demonstrations, holdout, length_normalize=length_normalize)
        for i, example in enumerate(examples):
            shown = [holdout[d].demonstration for d in demonstrations[i]]
            base, context = (
                [one_at_a_time(model, [s])[0] / (s.scored.sum() if length_normalize else 1) for s in sequences]
                for sequences in (example.sequences, [in_context(s, shown) for s in example.sequences])
            )
            gain = np.subtract(context, base)
            expected = gain[0] - gain[1] if kind == "pair" else gain[0] if example.desirable else -gain[0]
            assert scores.score[i] == pytest.approx(expected, abs=2e-4)


def test_scores_do_not_depend_on_order_or_other_rows(monkeypatch):
    model = make_model().eval()
    examples, demonstrations, holdout = examples_and_demonstrations("sft", 20)
    engine = Engine(model, device=CPU, budget=Budget(200, 200))

    def score(index):
        chosen = [examples[i] for i in index], [demonstrations[i] for i in index]
        return ica_scores(engine, *chosen, holdout, length_normalize=False).score

    everything = score(range(20))
    permuted = np.random.default_rng(0).permutation(20)
    np.testing.assert_allclose(score(permuted), everything[permuted], atol=1e-4)
    np.testing.assert_allclose(score([4, 11]), everything[[4, 11]], atol=1e-4)
    monkeypatch.setattr("ica_plugin.scorers.in_context.ROWS_PER_BLOCK", 3)
    np.testing.assert_allclose(score(range(20)), everything, atol=1e-4)
