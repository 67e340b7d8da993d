"""The golden runs of a plain transformers Trainer."""

import json

import pytest

from golden import FOLDER, OTHER_CPU, PLAIN, block, check_golden, differences, record
from runs import build, tokenised

SETTINGS = {"optim": "sgd", **PLAIN}
BLOCKS = {
    "window": block(refresh_interval=2),
    "all": block(score="ica + likelihood", weighting="rank", retrieval="random", refresh_interval=4, refresh_scope="all"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_golden(tmp_path, name):
    check_golden(f"transformers-{name}", build(tmp_path, BLOCKS[name], train=tokenised(14, 0), **SETTINGS))


def test_a_golden_file_notices_a_change(tmp_path):
    """Slightly other weights move scores, weights and parameters far beyond what passes."""
    trainer = build(tmp_path, {**BLOCKS["window"], "temperature": 1.1}, train=tokenised(14, 0), **SETTINGS)
    trainer.train()
    worst = differences(record(trainer), json.loads((FOLDER / "transformers-window.json").read_text()))
    assert all(worst[kind] > 10 * limit for kind, limit in OTHER_CPU.items()), worst
