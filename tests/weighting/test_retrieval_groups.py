"""`retrieval_groups`: rows share demonstration sets."""

import numpy as np
import pytest

from ica_plugin.config import ICAConfig
from ica_plugin.data.holdout import check_holdout
from ica_plugin.data.store import Example, Sequence
from ica_plugin.weighting.retrieval import retrieve


def row(prompt, response=(3, 4)):
    tokens = np.array([*prompt, *response])
    return Example((Sequence(tokens, np.arange(len(tokens)) >= len(prompt)),), "sft")


def vectors(sequences):
    """Prompts are points on a circle, by their first token in degrees."""
    angles = np.radians([s.prompt[0] for s in sequences])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def chosen(train, held, *, rows=None, k=2, retrieval="policy", groups=None, context=None):
    config = ICAConfig(holdout="unused", k=k, retrieval=retrieval, retrieval_groups=groups)
    holdout = check_holdout("test", held, train, context)
    rows = list(range(len(train))) if rows is None else rows
    decode = lambda tokens: " ".join(f"w{t}" for t in tokens)  # noqa: E731
    return retrieve(train, holdout, config, rows=rows, context=context, embed=vectors, decode=decode)


HELD = [row([angle, 7, i]) for i, angle in enumerate(range(0, 360, 15))]
TRAIN = [row([angle, 8, i]) for i, angle in enumerate(range(4, 360, 3))]


@pytest.mark.parametrize("retrieval", ["policy", "bm25", "random"])
def test_rows_share_that_many_sets(retrieval):
    sets = {tuple(demos) for demos in chosen(TRAIN, HELD, retrieval=retrieval, groups=4)}
    assert len(sets) == 4 and all(len(demos) == 2 for demos in sets)


def test_a_row_takes_the_set_of_a_near_prototype():
    for train, demos in zip(TRAIN, chosen(TRAIN, HELD, groups=6), strict=True):
        angle = train.sequences[0].tokens[0]
        distances = [abs((HELD[d].sequences[0].tokens[0] - angle + 180) % 360 - 180) for d in demos]
        assert max(distances) <= 60


def test_as_many_groups_as_holdout_rows_is_the_nearest_row_and_its_nearest():
    for train, demos in zip(TRAIN, chosen(TRAIN, HELD, groups=1000), strict=True):
        nearest = int(np.argmax(vectors([train.sequences[0]]) @ vectors([h.sequences[0] for h in HELD]).T))
        assert nearest in demos


def test_the_set_does_not_depend_on_other_rows():
    everything = chosen(TRAIN, HELD, groups=4)
    assert chosen(TRAIN, HELD, rows=[5, 90, 2], groups=4) == [everything[i] for i in (5, 90, 2)]
    assert chosen(TRAIN[40:50], HELD, groups=4) == everything[40:50]


def test_a_row_still_never_sees_itself():
    train = [*HELD[:6], *TRAIN]
    for i, demos in enumerate(chosen(train, HELD, groups=3)[:6]):
        assert i not in demos and len(demos) == 2


def test_a_set_that_does_not_fit_is_shortened():
    assert all(len(demos) == 1 for demos in chosen(TRAIN, HELD, groups=3, context=12))
