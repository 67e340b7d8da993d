import numpy as np
import pytest

import tiny
from ica_plugin.config import ICAConfig
from ica_plugin.data.holdout import check_holdout
from ica_plugin.data.store import Example, Sequence
from ica_plugin.errors import ICAError
from ica_plugin.weighting.retrieval import report_fewer, retrieve

WORDS = {i: f"w{i}" for i in range(1000)}


def row(prompt, response=(900, 901)) -> Example:
    tokens = np.array([*prompt, *response])
    return Example((Sequence(tokens, np.arange(len(tokens)) >= len(prompt)),), "sft")


def decode(tokens) -> str:
    return " ".join(WORDS[int(t)] for t in tokens)


def embed(sequences) -> np.ndarray:
    """A bag of tokens: a deterministic stand-in for hidden states."""
    return np.stack([np.bincount(s.prompt, minlength=1000).astype(float) for s in sequences])


HOLDOUT = [row([10, 11, 12]), row([20, 21, 22]), row([30, 31, 32]), row([10, 21, 32])]
TRAIN = [row([20, 21, 22], (500,)), row([10, 11, 12], (501,)), row([30, 31, 99], (502,))]


def choose(retrieval, k=1, train=TRAIN, holdout=HOLDOUT, context=None, rows=None, seed=42):
    checked = check_holdout("holdout", holdout, train, context)
    config = ICAConfig(holdout="x", retrieval=retrieval, k=k, seed=seed)
    return retrieve(
        train,
        checked,
        config,
        rows=list(range(len(train))) if rows is None else rows,
        context=context,
        embed=embed,
        decode=decode,
    )


@pytest.mark.parametrize("retrieval", ["policy", "bm25"])
def test_the_nearest_prompts_are_found(retrieval):
    assert choose(retrieval) == [[1], [0], [2]]


@pytest.mark.parametrize(
    "texts", [["今天天气很好", "他喜欢吃苹果", "股票价格上涨"], ["7 3", "8 4", "9 5"], ["🍎", "🚗", "🌙"]], ids=str
)
def test_bm25_sees_text_without_spaces(texts):
    """Cut into words, all of these score 0 against each other, and every row is shown the first holdout rows."""
    tokenizer = tiny.make_tokenizer()
    holdout = [row(tokenizer(text)["input_ids"], (900,)) for text in texts]
    train = [row(tokenizer(text)["input_ids"], (901,)) for text in texts[::-1]]
    assert choose("bm25", train=train, holdout=holdout) == [[2], [1], [0]]


def test_bm25_of_rows_without_a_prompt_or_without_a_token_in_common():
    assert choose("bm25", train=[row([], (500, 501)), row([700, 701], (502,))]) == [[0], [0]]
    assert choose("bm25", train=TRAIN[:1], holdout=[row([], (700, 701)), row([], (702, 703))]) == [[0]]


@pytest.mark.parametrize("retrieval", ["policy", "bm25", "random"])
def test_the_choice_depends_on_the_row_alone(retrieval):
    together = choose(retrieval, k=2)
    assert [choose(retrieval, k=2, train=[one])[0] for one in TRAIN] == together
    assert choose(retrieval, k=2, train=TRAIN[::-1]) == together[::-1]
    assert choose(retrieval, k=2, rows=[2, 0]) == [together[2], together[0]]


@pytest.mark.parametrize(
    "texts",
    [["天气很好", "数学很难", "猫在睡觉"], ["3", "7", "9"], ["😀😀", "🚀", "🐈 🐈"]],
    ids=["chinese", "digits", "emoji"],
)
def test_bm25_reads_what_has_no_spaces(texts):
    """Without words between spaces every row was shown holdout rows 0 … k − 1."""
    tokenizer = tiny.make_tokenizer()
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    holdout = [row([*prompt, 5], (900 + place,)) for place, prompt in enumerate(tokens)]
    train = [row([*prompt, 6], (910 + place,)) for place, prompt in enumerate(tokens)]
    assert choose("bm25", train=train, holdout=holdout) == [[0], [1], [2]]
    assert choose("bm25", train=train[::-1], holdout=holdout) == [[2], [1], [0]]


def test_random_choices_follow_the_seed():
    many = [row([i, i + 1], (i,)) for i in range(100, 160)]
    assert choose("random", train=many) == choose("random", train=many)
    assert choose("random", train=many) != choose("random", train=many, seed=7)
    counts = np.bincount([demos[0] for demos in choose("random", train=many)], minlength=4)
    assert (counts > 5).all()


def test_ties_go_to_the_first_holdout_row():
    twins = [row([10, 11]), row([10, 11], (902,)), row([50, 51])]
    assert choose("policy", train=[row([10, 11], (7,))], holdout=twins) == [[0]]


def test_demonstrations_come_in_one_order_for_all_rows():
    chosen = choose("policy", k=3)
    position = {}
    for demos in chosen:
        for first, second in zip(demos, demos[1:]):
            assert (second, first) not in position
            position[first, second] = True


def test_a_row_never_sees_itself():
    train = [*TRAIN, HOLDOUT[1]]
    assert choose("policy", k=4, train=train)[3] and 1 not in choose("policy", k=4, train=train)[3]
    assert choose("policy", k=4, train=[HOLDOUT[1]], holdout=[HOLDOUT[1]]) == [[]]


def test_a_pair_never_sees_either_of_its_responses():
    def pair(chosen, rejected):
        return Example((row([1, 2], chosen).sequences[0], row([1, 2], rejected).sequences[0]), "pair")

    train = [pair((5,), (6,))]
    holdout = [pair((6,), (8,)), pair((5,), (9,)), pair((7,), (6,))]
    checked = check_holdout("h", holdout, train, None)
    assert checked.hidden_from == [frozenset({0, 1})] and checked.rows_in_train == 1


def test_demonstrations_that_do_not_fit_lower_k_and_are_counted(capsys):
    assert [len(d) for d in choose("policy", k=3, context=4 + 5 + 5)] == [2, 2, 2]
    assert [len(d) for d in choose("policy", k=3, context=6)] == [0, 0, 0]
    report_fewer([[1, 2], [1], []], 3, 4)
    text = capsys.readouterr().err
    assert "3 of 3 rows see fewer than k = 3" in text and "1 of them see none" in text
    report_fewer([[1, 2]], 2, 4)
    assert capsys.readouterr().err == ""


def test_a_long_nearest_row_does_not_keep_the_others_away():
    holdout = [row([20, 21, 22], response=tuple(range(800, 809))), *HOLDOUT]
    assert choose("policy", k=2, holdout=holdout)[0][0] == 0, "the nearest"
    fits = choose("policy", k=2, holdout=holdout, context=14)[0]
    assert len(fits) == 2 and {holdout[i].longest for i in fits} == {5} and 2 in fits


def test_a_holdout_smaller_than_k(capsys):
    assert choose("policy", k=9)[0] == sorted(choose("policy", k=9)[0], key=choose("policy", k=9)[0].index)
    assert {len(d) for d in choose("policy", k=9)} == {4}


def test_an_unknown_sentence_transformer_is_named():
    with pytest.raises(ICAError, match="'no/such-model' is none of policy, bm25, random"):
        choose("no/such-model")


@pytest.mark.parametrize(
    ("holdout", "context", "message"),
    [
        ([], None, "has no rows"),
        ([row([1, 2], ())], None, "none of its 1 rows has a supervised token"),
        ([row([1] * 50)], 20, "1 row\\(s\\) are longer than the model's context of 20 tokens, first row 0 with 52"),
        ([Example(row([1, 2]).sequences, "unpaired", False)], None, "no row is labelled desirable"),
        ([Example(row([1, 2]).sequences * 2, "pair")], None, "its rows are pair rows but the run trains on sft rows"),
    ],
)
def test_refused_holdouts(holdout, context, message):
    with pytest.raises(ICAError, match=message):
        check_holdout("good.jsonl", holdout, TRAIN, context)
