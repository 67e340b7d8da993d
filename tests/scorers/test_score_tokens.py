"""`score_tokens`: the first supervised tokens alone are scored, and nothing after them is computed."""

from __future__ import annotations

import numpy as np
import pytest

from ica_plugin.config import parse_config
from ica_plugin.data.media import Media
from ica_plugin.data.store import Example, Sequence
from ica_plugin.errors import ICAError
from ica_plugin.scorers import scores_for
from ica_plugin.scorers.in_context import beginning, in_context
from scored import gradient, logprob, make_context, mean_logprob, reference_margin, score, sign
from tiny import make_model

T = 4


def cut(row: Example) -> Example:
    """Written out: each response loses what comes after its T-th supervised token."""
    sequences = []
    for sequence in row.sequences:
        end = [place for place, scored in enumerate(sequence.scored, 1) if scored][:T][-1]
        sequences.append(Sequence(sequence.tokens[:end], sequence.scored[:end]))
    return Example(tuple(sequences), row.kind, row.desirable)


def shown_to(context, i: int) -> list[Sequence]:
    return [context.holdout.examples[d].demonstration for d in context.demonstrations[i]]


@pytest.mark.parametrize("kind", ["sft", "pair", "unpaired"])
@pytest.mark.parametrize("length_normalize", [False, True])
def test_ica_and_likelihood_are_those_of_the_first_tokens(kind, length_normalize):
    context = make_context("ica + likelihood", kind, score_tokens=T, length_normalize=length_normalize, drop_tokens=None)
    model, forwards = context.engine.model, []
    _ = context.engine.path  # its trial is no scoring
    context.engine.input_embeddings.register_forward_hook(lambda _, given, __: forwards.append(given[0].numel()))
    columns = scores_for(context)
    computed = sum(forwards)
    lengths = [int(s.scored.sum()) for row in context.train for s in row.sequences]
    assert min(lengths) < T < max(lengths), "some rows are cut and some are not"
    for i, row in enumerate(context.train):
        sums = [
            [float(logprob(model, s).detach()) for s in sequences]
            for sequences in (cut(row).sequences, [in_context(s, shown_to(context, i)) for s in cut(row).sequences])
        ]
        counted = [min(T, int(s.scored.sum())) if length_normalize else 1 for s in row.sequences]
        base, after = (np.divide(values, counted) for values in sums)
        gain = after - base
        assert columns["ica"][i] == pytest.approx(sign(row) * (gain[0] - gain[1] if kind == "pair" else gain[0]), abs=1e-4)
        assert columns["likelihood"][i] == pytest.approx(sign(row) * mean_logprob(model, cut(row)), abs=1e-4)
    rows = sum(len(s.tokens) for row in context.train for s in cut(row).sequences)
    shown = sum(len(d.tokens) for i, row in enumerate(context.train) for d in shown_to(context, i) for _ in row.sequences)
    assert computed <= 2 * rows + shown, "tokens after the last scored one went through the model"


def test_other_scorers_read_as_much():
    for name, kind in (("irm", "pair"), ("influence", "sft"), ("lossdiff", "pair")):
        context = make_context(name, kind, score_tokens=T)
        whole = make_context(name, kind, model=context.engine.model)
        whole.train = [cut(row) for row in whole.train]
        np.testing.assert_allclose(score(context), score(whole), rtol=1e-3, atol=1e-4)
    context = make_context("irm", "pair", score_tokens=T)
    model = context.engine.model
    margins = [
        0.3 * float((logprob(model, c.sequences[0]) - logprob(model, c.sequences[1])).detach() - reference_margin(model, c))
        for c in map(cut, context.train)
    ]
    np.testing.assert_allclose(score(context), margins, atol=1e-4)
    context = make_context("influence", "sft", score_tokens=T)
    model = context.engine.model
    target = np.mean([np.concatenate([g.ravel() for g in gradient(model, h)]) for h in context.shown], axis=0)
    expected = [float(np.concatenate([g.ravel() for g in gradient(model, cut(row))]) @ target) for row in context.train]
    np.testing.assert_allclose(score(context), expected, rtol=1e-3, atol=1e-4)


def test_one_shot_counts_tokens_of_the_holdout_row_and_shows_the_whole_train_row():
    context = make_context("one_shot", score_tokens=T)
    model, holdout = context.engine.model, context.holdout.examples
    expected = [
        np.mean([mean_logprob(model, cut(holdout[d]), [row.demonstration]) - mean_logprob(model, cut(holdout[d])) for d in demos])
        for row, demos in zip(context.train, context.demonstrations, strict=True)
    ]
    np.testing.assert_allclose(score(context), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["rds", "random"])
def test_what_is_not_about_tokens_reads_whole_rows(name):
    model = make_model()
    np.testing.assert_array_equal(score(make_context(name, model=model, score_tokens=T)), score(make_context(name, model=model)))


def test_a_row_of_several_turns_ends_with_its_last_scored_token():
    row = Example((Sequence(np.arange(9), np.array([0, 1, 1, 0, 0, 1, 1, 1, 0], bool)),), "sft")
    kept = beginning(row, 3).sequences[0]
    assert kept.tokens.tolist() == [0, 1, 2, 3, 4, 5] and kept.scored.tolist() == [False, True, True, False, False, True]
    assert beginning(row, 5).sequences[0] is row.sequences[0] and beginning(row, None) is row


def test_a_row_with_images_keeps_its_tokens():
    row = Sequence(np.arange(6), np.arange(6) > 1, ((0, Media(list, 0, b"")),))
    kept = beginning(Example((row,), "sft"), 2).sequences[0]
    assert len(kept.tokens) == 6 and np.flatnonzero(kept.scored).tolist() == [2, 3]


@pytest.mark.parametrize("value", [0, -1, 1.5, "auto"])
def test_the_key_is_a_number_of_tokens(value):
    with pytest.raises(ICAError, match=r"ica\.score_tokens"):
        parse_config({"holdout": "x", "score_tokens": value})
