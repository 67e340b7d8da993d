"""What is said of a scoring's cost: the bar's tokens are those that scorers report, and the line's arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

import tiny
from checks import callback_of
from ica_plugin.config import parse_config
from ica_plugin.run import cost, scoring
from ica_plugin.run.cost import Cost, described, shared_tokens, tokens_of_rows
from runs import ROWS, build

CHEAPER = ["k: 1", "retrieval_groups: 8", "score_tokens: 64"]


@pytest.mark.parametrize(
    "block",
    [
        {"score": "ica"},
        {"score": "ica + likelihood", "score_tokens": 3},
        {"score": "likelihood"},
        {"score": "likelihood", "drop_tokens": 0.1},
        {"score": "influence + rds"},
        {"score": "one_shot"},
    ],
)
def test_the_bar_ends_where_the_scoring_does(tmp_path, block):
    model = get_peft_model(tiny.make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    callback = callback_of(build(tmp_path, block, model=model))
    rows, seen = list(range(ROWS)), []
    demonstrations = callback.scoring.find_demonstrations(rows)
    expected = tokens_of_rows(callback.config, callback.train, callback.holdout, rows, demonstrations)
    assert expected.shape == (ROWS,) and (expected > 0).all()
    scoring.scores_for_sets(callback.scoring.context(rows, demonstrations, seen.append))
    done = sum(seen)
    # Besides the rows: what is read of the holdout, which is not counted by row.
    holdout = sum(len(row.demonstration.tokens) for row in callback.holdout.examples)
    assert expected.sum() <= done <= expected.sum() + 2 * holdout
    if "one_shot" not in block["score"] and "influence" not in block["score"]:
        assert done == expected.sum()


def test_shared_demonstrations_are_counted_once(tmp_path):
    holdout = callback_of(build(tmp_path, {})).holdout
    lengths = [len(row.demonstration.tokens) for row in holdout.examples]
    assert shared_tokens(holdout, 1, [[1, 2], [0, 2], [1, 3], [1, 2]]) == 2 * lengths[1] + lengths[2]
    assert shared_tokens(holdout, 2, [[1, 2]]) == lengths[1] + lengths[2]


def test_the_line_names_what_is_cheaper_where_scoring_is_dear():
    config = parse_config({"holdout": "x"})
    line = described(1800, 3600, config)
    assert "about 30 minutes, 33 % of the run" in line and all(name in line for name in CHEAPER)
    assert "Cheaper" not in described(900, 3600, config)
    assert described(120, 0, config) == "scoring will take about 2 minutes."
    cheap = parse_config({"holdout": "x", "k": 1, "retrieval_groups": 8})
    line = described(1800, 3600, cheap)
    assert "score_tokens: 64" in line and "k: 1" not in line and "retrieval_groups" not in line


def test_the_line_comes_once_from_what_was_measured(monkeypatch, capsys):
    class Bar:
        total, n = 1000, 0

        def update(self, tokens):
            self.n += tokens

    now = iter(np.arange(5) * 4.0 + 1)
    monkeypatch.setattr(cost, "time", SimpleNamespace(monotonic=lambda: next(now)))
    bar = Bar()
    watched = Cost(bar, 3.0, parse_config({"holdout": "x"}))
    for _ in range(5):
        watched(10)
    assert bar.n == 50
    # 20 tokens in 8 seconds after the first forward: 400 seconds for all of them.
    assert capsys.readouterr().err == "[ica] scoring will take about 7 minutes, 25 % of the run.\n"
