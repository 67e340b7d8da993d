"""Rows of the evidence experiments: kinds as stated, and no row in two of train, holdout and test."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import evidence_rows

SIZES = {
    "noise": {
        "clean": 6,
        "altered numbers": 3,
        "another row's answer": 3,
        "steps dropped": 2,
        "steps shuffled": 2,
        "holdout": 8,
        "test": 5,
    },
    "off-target": {"gsm8k": 5, "alpaca": 6, "code": 7, "holdout": 8, "test": 5},
    "preferences": {"right way round": 9, "flipped": 4, "holdout": 6, "test": 5},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for part, start in (("train", 0), ("test", 1000)):
        rows = [
            {"question": f"What is {i}?", "answer": f"First {i} + 1 = <<{i}+1={i + 1}>>{i + 1}\nThen it ends\n#### {i + 1}"}
            for i in range(start, start + 40)
        ]
        (folder / f"gsm8k_{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("alpaca_en_demo", "code_alpaca_2k"):
        rows = [{"instruction": f"{name} {i}", "input": "", "output": f"done {i}"} for i in range(20)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    solved = [
        {
            "question": f"Solve {i}",
            **{m: {"is_correct": j % 2 == 0, "solution": f"{m} says {i}"} for j, m in enumerate(evidence_rows.MODELS)},
        }
        for i in range(40)
    ]
    (folder / "gsm8k_model_solutions.jsonl").write_text("\n".join(map(json.dumps, solved)))
    return folder


def question(row: dict) -> str:
    return row["prompt"][-1]["content"]


@pytest.mark.parametrize("experiment", SIZES)
def test_kinds_are_as_many_as_stated_and_no_row_stands_twice(data, experiment):
    sizes = SIZES[experiment]
    rows = evidence_rows.draw(experiment, data, lambda row: True, 3, sizes)
    kinds = [row["kind"] for row in rows.train]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {k: n for k, n in sizes.items() if k not in ("holdout", "test")}
    assert (len(rows.holdout), len(rows.test)) == (sizes["holdout"], sizes["test"]) and rows.good in kinds
    everywhere = [question(row) for part in (rows.train, rows.holdout, rows.test) for row in part]
    assert len(set(everywhere)) == len(everywhere)
    other = evidence_rows.draw(experiment, data, lambda row: True, 4, sizes)
    assert other.test == rows.test and other.train != rows.train


def test_spoilt_answers_are_spoilt_and_clean_ones_are_not(data):
    answers = {question(row): row["completion"][0]["content"] for row in evidence_rows.gsm8k(data / "gsm8k_train.jsonl")}
    assert all("<<" not in answer for answer in answers.values())
    for row in evidence_rows.draw("noise", data, lambda row: True, 0, SIZES["noise"]).train:
        own, now = answers[question(row)], row["completion"][0]["content"]
        assert (own == now) == (row["kind"] == "clean"), row
        if row["kind"] == "steps shuffled":
            assert sorted(own.splitlines()) == sorted(now.splitlines()) and own.splitlines()[-1] == now.splitlines()[-1]
        if row["kind"] == "another row's answer":
            assert now in answers.values()


def test_flipped_pairs_prefer_the_wrong_answer(data):
    right = {row["chosen"][0]["content"] for row in evidence_rows.solutions(data / "gsm8k_model_solutions.jsonl")}
    rows = evidence_rows.draw("preferences", data, lambda row: True, 0, SIZES["preferences"])
    for row in rows.train:
        assert (row["chosen"][0]["content"] in right) == (row["kind"] == "right way round")
    assert all(row["chosen"][0]["content"] in right for row in rows.holdout + rows.test)


def test_rows_that_do_not_fit_are_not_drawn(data):
    short = evidence_rows.draw("off-target", data, lambda row: question(row) != "What is 7?", 0, SIZES["off-target"])
    assert "What is 7?" not in {question(row) for row in short.train + short.holdout}


def test_altered_numbers_keep_their_length():
    assert evidence_rows._altered_numbers("9 of 128", "", random.Random(1)).split()[0].isdigit()
    assert len(evidence_rows._altered_numbers("9 of 128", "", random.Random(1))) == len("9 of 128")
