"""The demo's own parts that need no model: generated data and the report."""

import re
from collections import Counter

import pyarrow as pa
import pytest
from datasets import Dataset

pytest.importorskip("matplotlib")

from demo import data, report  # noqa: E402


@pytest.fixture(scope="module")
def splits():
    return data.make_splits()


def is_right(response: str) -> bool:
    """Whether every calculation of a solution is right and its last result is the answer."""
    steps = re.findall(r": (\d+) (.) (\d+) = (\d+)$", response, flags=re.MULTILINE)
    right = all(data.OPERATORS[op](int(left), int(other)) == int(result) for left, op, other, result in steps)
    return right and response.splitlines()[-1] == f"Answer: {steps[-1][-1]}"


def test_splits_are_reproducible_and_share_no_prompt(splits):
    assert splits == data.make_splits()
    assert splits != data.make_splits(seed=1)
    prompts = Counter(row.prompt for rows in vars(splits).values() for row in rows)
    assert max(prompts.values()) == 1


def test_splits_hold_the_kinds_asked_for():
    splits = data.make_splits(target=5, corrupted=3, off_target=2, holdout=6, test=4)
    assert Counter(row.kind for row in splits.train) == {
        kind: {"target": 5, "corrupted": 3, "off-target": 2}[group] for kind, group in data.GROUPS.items()
    }
    assert [row.kind for row in splits.holdout] == [data.TARGET] * 6
    assert [row.kind for row in splits.test] == [data.TARGET] * 4


def test_clean_solutions_are_right_and_altered_numbers_are_not(splits):
    rows = splits.train + splits.holdout + splits.test
    assert all(is_right(row.response) for row in rows if row.kind == data.TARGET)
    assert not any(is_right(row.response) for row in rows if row.kind == "altered numbers")


def test_another_rows_solution_is_right_for_that_row_only(splits):
    def uses_all_numbers(row):
        return set(re.findall(r"\d+", row.prompt)) <= set(re.findall(r"\d+", row.response))

    assert all(uses_all_numbers(row) for row in splits.train if row.kind == data.TARGET)
    swapped = [row for row in splits.train if row.kind == "other row's solution"]
    assert all(is_right(row.response) for row in swapped)
    assert not any(uses_all_numbers(row) for row in swapped)


def test_draws_by_kind_counts_draws_in_tokens():
    scores = pa.table({"row": [2, 0, 1], "draws": [2, 0, 1], "tokens": [10, 20, 10], "score": [0.0] * 3})
    target, code = report.draws_by_kind(scores, ["code", "target", "target"])
    assert (target.kind, target.draws, target.mean) == ("target", [2, 1], 1.5)
    assert (target.token_share, target.trained_share) == pytest.approx((0.5, 1))
    assert (code.kind, code.draws) == ("code", [0])
    assert (code.token_share, code.trained_share) == pytest.approx((0.5, 0))


class Characters:
    """A tokenizer of single characters with a chat template: `u…|a…|` and a line end, `|` ends a turn."""

    eos_token_id = ord("|")

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        text = "".join(f"{message['role'][0]}{message['content']}|" for message in messages)
        return {"input_ids": [ord(c) for c in text + ("a" if add_generation_prompt else "\n")]}

    def decode(self, tokens):
        return "".join(map(chr, tokens))


ROWS = [data.Row("target", "1+1", "2"), data.Row("code", "print", "ok")]


def test_encode_supervises_the_answer_and_its_end():
    tokens, labels = report.encode(Characters(), ROWS[1])
    assert Characters().decode(tokens) == "uprint|aok|\n"
    assert [token for token in labels if token != report.IGNORED] == [ord(c) for c in "ok|"]


def prepared(rows):
    tokens, labels = zip(*(report.encode(Characters(), row) for row in rows))
    return Dataset.from_dict({"input_ids": tokens, "labels": labels})


def test_match_kinds_goes_by_tokens_not_by_order():
    scores = pa.table({"row": [0, 1], "tokens": [3, 2]})
    assert report.match_kinds(prepared(ROWS[::-1]), scores, ROWS, Characters()) == ["code", "target"]


def test_match_kinds_refuses_other_rows_and_another_order():
    scores = pa.table({"row": [0, 1], "tokens": [2, 3]})
    with pytest.raises(ValueError, match="supervised tokens"):
        report.match_kinds(prepared(ROWS[::-1]), scores, ROWS, Characters())
    with pytest.raises(ValueError, match="not a generated row"):
        report.match_kinds(prepared(ROWS), scores, ROWS[:1], Characters())


def test_plot_draws_writes_a_picture(tmp_path):
    kinds = [report.KindDraws(kind, [0, 1, 3], 0.1, 0.1) for kind in data.GROUPS]
    report.plot_draws(kinds, tmp_path / "draws.png")
    assert (tmp_path / "draws.png").read_bytes().startswith(b"\x89PNG")


def test_tables_show_every_kind_and_loss():
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(report.draws_table([report.KindDraws("code", [0, 1, 2, 0], 0.25, 0.15)]))
    console.print(report.losses_table({"before training": 1.5, "plain": 1.25, "ica": 1.0}))
    text = console.export_text()
    assert re.search(r"off-target.*code.*4.*2.*1.*1.*0\.75.*25%.*15%", text)
    assert re.search(r"ica.*1\.0000.*-0\.5000", text)
