"""Rows as flat arrays: a list of examples to its users, a few bytes a token in memory."""

import pickle
import tracemalloc

import numpy as np
import pytest

from ica_plugin.data import store
from ica_plugin.data.holdout import check_holdout
from ica_plugin.data.store import Example, Rows, Sequence
from ica_plugin.errors import ICAError


def sequence(rng, length, scored=None):
    mask = rng.random(length) < 0.5 if scored is None else np.full(length, scored)
    return Sequence(rng.integers(0, 150_000, length), mask)


def examples(kind: str, n: int = 9, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    sides = 2 if kind == "pair" else 1
    rows = [Example(tuple(sequence(rng, int(rng.integers(1, 9))) for _ in range(sides)), kind, bool(i % 3)) for i in range(n - 2)]
    unscored = Example(tuple(sequence(rng, 4, scored=False) for _ in range(sides)), kind)
    empty = Example(tuple(sequence(rng, 0) for _ in range(sides)), kind)
    return [*rows[:3], empty, *rows[3:], unscored]


def content(example: Example) -> tuple:
    return (example.kind, example.desirable, [(s.tokens.tolist(), s.scored.tolist()) for s in example.sequences])


@pytest.mark.parametrize("kind", ["sft", "pair", "unpaired"])
def test_rows_are_the_examples_and_know_their_facts(kind):
    plain = examples(kind)
    rows = Rows.of(plain)
    picked = [5, 0, 3, 5]
    for view, expected in (
        (rows, plain),
        (rows[2:7], plain[2:7]),
        (rows[::-2], plain[::-2]),
        (rows[picked], [plain[i] for i in picked]),
        (rows[3:][np.array([1, 4])], [plain[4], plain[7]]),
        (rows[:0], []),
        (pickle.loads(pickle.dumps(rows)), plain),
    ):
        assert list(map(content, view)) == list(map(content, expected))
        assert [content(view[i]) for i in range(-len(view), 0)] == list(map(content, expected))
        assert view.supervised.tolist() == [row.supervised_tokens if row.can_be_scored else 0 for row in expected]
        assert view.can_be_scored.tolist() == [row.can_be_scored for row in expected]
        assert view.longest.tolist() == [row.longest for row in expected]
        assert view.desirable.tolist() == [row.desirable for row in expected]
        assert view.lengths.tolist() == [[len(s.tokens) for s in row.sequences] for row in expected]
        assert view.digest == Rows.of(expected or rows[:0]).digest
        assert Rows.of(list(view)).supervised.tolist() == view.supervised.tolist()
    with pytest.raises(IndexError):
        rows[len(plain)]
    assert rows[np.int64(2)].sequences[0].digest == plain[2].sequences[0].digest


@pytest.mark.parametrize("block", [1, 7, 40])
def test_facts_are_summed_in_blocks_of_any_size(monkeypatch, block):
    plain = examples("pair", 30)
    expected = Rows.of(plain).digest
    monkeypatch.setattr(store, "TOKENS_PER_BLOCK", block)
    rows = Rows.of(plain)
    assert rows.supervised.tolist() == [row.supervised_tokens if row.can_be_scored else 0 for row in plain]
    assert rows.token_sums.tolist() == [[int(s.tokens.sum()) for s in row.sequences] for row in plain]
    assert rows.digest == expected == Rows.of(plain)[::-1][::-1].digest


def test_no_rows():
    rows = Rows.of([])
    assert len(rows) == 0 and list(rows) == [] and rows.supervised.tolist() == [] and rows.kind == "sft"


def test_rows_of_two_kinds_are_refused():
    with pytest.raises(ICAError, match="sft rows and pair rows in one set"):
        Rows.of([*examples("sft"), *examples("pair")])


def test_a_digest_tells_order_mask_and_label_apart():
    plain = examples("unpaired")
    seen = {Rows.of(plain).digest, Rows.of(plain[::-1]).digest}
    first = plain[0].sequences[0]
    for other in (
        Example((first,), "unpaired", not plain[0].desirable),
        Example((Sequence(first.tokens, ~first.scored),), "unpaired"),
    ):
        seen.add(Rows.of([other, *plain[1:]]).digest)
    assert len(seen) == 4


def test_the_digest_of_a_sequence_is_that_of_its_int64_tokens():
    tokens = np.arange(7)
    assert Sequence(tokens.astype(np.int32), tokens > 2).digest == Sequence(tokens, tokens > 2).digest
    assert Sequence(tokens, tokens > 2).digest == "5f7a1c24d74bd749126d4166b670f3f4"


def test_a_row_costs_its_tokens_and_no_object():
    """20,000 rows of 100 tokens: 5 bytes a token and a few a row, facts included in no more than a few vectors."""
    n, length = 20_000, 100
    rng = np.random.default_rng(0)
    one = Example((sequence(rng, length),), "sft")
    tracemalloc.start()
    rows = Rows.of(one for _ in range(n))
    held, _ = tracemalloc.get_traced_memory()
    assert len(rows.supervised) == n and len(check_holdout("h", [one], rows[:10], None).hidden_from) == 10
    tracemalloc.stop()
    assert held < 1.25 * 5 * n * length


def test_the_arrays_may_be_memory_mapped(tmp_path):
    rows = Rows.of(examples("sft"))
    held = []
    for name in ("_tokens", "_scored", "_starts", "_desirable"):
        np.save(tmp_path / f"{name}.npy", getattr(rows, name))
        held.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    mapped = Rows(*held[:3], rows.kind, held[3])
    assert mapped.digest == rows.digest and list(map(content, mapped)) == list(map(content, rows))


def test_train_rows_in_the_holdout_are_found_by_their_tokens():
    train = examples("pair", 30)
    one, two = [row for row, example in enumerate(train) if example.can_be_scored][2:4]
    held = [train[one], *examples("pair", 6, seed=1)[:3], Example(train[two].sequences[::-1], "pair")]
    holdout = check_holdout("h", held, train, None)
    assert {row: hidden for row, hidden in enumerate(holdout.hidden_from) if hidden} == {one: {0}, two: {4}}
    assert holdout.digest == check_holdout("h", held, train[:1], None).digest != check_holdout("h", held[:4], train, None).digest
