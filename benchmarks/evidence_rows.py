"""Rows of the evidence experiments: real data, part of it spoilt in stated ways."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scoring

Row = dict[str, Any]

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@dataclass(frozen=True)
class Rows:
    """One seed's draw. Rows are in TRL's conversational form; `train` rows carry their `kind`, `good` names the kind that
    the oracle keeps. No row stands in two of the three."""

    train: list[Row]
    holdout: list[Row]
    test: list[Row]
    good: str


def draw(experiment: str, data: Path, fits: Callable[[Row], bool], seed: int, sizes: dict[str, int]) -> Rows:
    """The rows of an experiment.

    Args:
        experiment: noise, off-target, preferences, gsm8k or alpaca.
        data: folder of the data files.
        fits: whether a row is short enough.
        seed: of the draw; test rows are the same for all seeds.
        sizes: rows of each kind, and `holdout` and `test`.
    """
    of = {"noise": _noise, "off-target": _off_target, "preferences": _preferences, "gsm8k": _clean_gsm8k, "alpaca": _clean_alpaca}
    return of[experiment](data, fits, random.Random(seed), sizes)


def _noise(data: Path, fits: Callable[[Row], bool], rng: random.Random, sizes: dict[str, int]) -> Rows:
    spoil = {
        "altered numbers": _altered_numbers,
        "another row's answer": lambda answer, other, rng: other,
        "steps dropped": lambda answer, other, rng: answer.splitlines()[-1],
        "steps shuffled": _shuffled_steps,
    }
    source = _shuffled([row for row in gsm8k(data / "gsm8k_train.jsonl") if fits(row)], rng)
    train = []
    for kind in ("clean", *spoil):
        for _ in range(sizes[kind]):
            row = source.pop()
            if kind != "clean":
                answer = spoil[kind](_answer(row), _answer(source[-1]), rng)
                row = _sft(row["prompt"][-1]["content"], answer)
            train.append({**row, "kind": kind})
    holdout = [source.pop() for _ in range(sizes["holdout"])]
    return Rows(_shuffled(train, rng), holdout, _test(data, fits, sizes), "clean")


def _off_target(data: Path, fits: Callable[[Row], bool], rng: random.Random, sizes: dict[str, int]) -> Rows:
    sources = {
        "gsm8k": gsm8k(data / "gsm8k_train.jsonl"),
        "alpaca": instructions(data / "alpaca_en_demo.json"),
        "code": instructions(data / "code_alpaca_2k.json"),
    }
    sources = {kind: _shuffled([row for row in rows if fits(row)], rng) for kind, rows in sources.items()}
    train = [{**sources[kind].pop(), "kind": kind} for kind in sources for _ in range(sizes[kind])]
    holdout = [sources["gsm8k"].pop() for _ in range(sizes["holdout"])]
    return Rows(_shuffled(train, rng), holdout, _test(data, fits, sizes), "gsm8k")


def _clean_gsm8k(data: Path, fits: Callable[[Row], bool], rng: random.Random, sizes: dict[str, int]) -> Rows:
    source = _shuffled([row for row in gsm8k(data / "gsm8k_train.jsonl") if fits(row)], rng)
    return _clean(source, _test(data, fits, sizes), rng, sizes)


def _clean_alpaca(data: Path, fits: Callable[[Row], bool], rng: random.Random, sizes: dict[str, int]) -> Rows:
    rows = [row for row in instructions(data / "alpaca_en_demo.json") if fits(row)]
    test = _shuffled(rows, random.Random(0))[: sizes["test"]]
    return _clean(_shuffled([row for row in rows if row not in test], rng), test, rng, sizes)


def _clean(source: list[Row], test: list[Row], rng: random.Random, sizes: dict[str, int]) -> Rows:
    train = [{**source.pop(), "kind": "clean"} for _ in range(sizes["clean"])]
    return Rows(_shuffled(train, rng), [source.pop() for _ in range(sizes["holdout"])], test, "clean")


def _preferences(data: Path, fits: Callable[[Row], bool], rng: random.Random, sizes: dict[str, int]) -> Rows:
    pairs = [row for row in solutions(data / "gsm8k_model_solutions.jsonl") if fits(row)]
    test = _shuffled(pairs, random.Random(0))[: sizes["test"]]
    rest = _shuffled([row for row in pairs if row not in test], rng)
    train = []
    for kind in ("right way round", "flipped"):
        for _ in range(sizes[kind]):
            row = rest.pop()
            if kind == "flipped":
                row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            train.append({**row, "kind": kind})
    holdout = [rest.pop() for _ in range(sizes["holdout"])]
    return Rows(_shuffled(train, rng), holdout, test, "right way round")


# The files.


def gsm8k(path: Path) -> list[Row]:
    return [_sft(question, answer) for question, (answer,) in scoring.gsm8k(str(path))]


def instructions(path: Path) -> list[Row]:
    return [_sft(question, answer) for question, (answer,) in scoring.alpaca(str(path))]


def solutions(path: Path) -> list[Row]:
    """One pair per question that one model got right and another wrong, with the right answer the shorter by a tenth at least.

    A model of this size cannot tell right arithmetic from wrong, but it can learn that wrong answers ramble.
    """
    pairs = []
    for row in map(json.loads, path.read_text().splitlines()):
        of = {
            right: [_without_marks(row[m]["solution"]) for m in MODELS if row[m]["is_correct"] == right]
            for right in (True, False)
        }
        if of[True] and of[False]:
            chosen, rejected = min(of[True], key=len), max(of[False], key=len)
            if len(chosen) <= 0.9 * len(rejected):
                pairs.append({"prompt": _prompt(row["question"]), "chosen": _response(chosen), "rejected": _response(rejected)})
    return pairs


def _test(data: Path, fits: Callable[[Row], bool], sizes: dict[str, int]) -> list[Row]:
    return _shuffled([row for row in gsm8k(data / "gsm8k_test.jsonl") if fits(row)], random.Random(0))[: sizes["test"]]


def _sft(question: str, answer: str) -> Row:
    return {"prompt": _prompt(question), "completion": _response(answer)}


def _prompt(question: str) -> list[dict[str, str]]:
    # An empty system turn, or the chat template would put its own of some twenty tokens in every row.
    return [{"role": "system", "content": ""}, {"role": "user", "content": question}]


def _response(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


def _answer(row: Row) -> str:
    return row["completion"][0]["content"]


def _without_marks(answer: str) -> str:
    return re.sub(r"<<.*?>>", "", answer)


def _altered_numbers(answer: str, other: str, rng: random.Random) -> str:
    return re.sub(r"\d+", lambda number: str(rng.randrange(10 ** (len(number[0]) - 1), 10 ** len(number[0]))), answer)


def _shuffled_steps(answer: str, other: str, rng: random.Random) -> str:
    lines = answer.splitlines()
    return "\n".join([*reversed(lines[:-1]), lines[-1]]) if len(lines) > 2 else "\n".join(reversed(lines))


def _shuffled(rows: list[Row], rng: random.Random) -> list[Row]:
    return rng.sample(rows, len(rows))
