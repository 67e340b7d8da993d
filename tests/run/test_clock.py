"""Seconds of training and of scoring, over several calls."""

from __future__ import annotations

import json
import time

import pytest
from transformers import TrainerCallback

from ica_plugin.run.clock import Clock
from runs import build


def test_several_calls_and_one_that_was_broken_off(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    clock = Clock()
    clock.begin()
    passes(5)
    clock.scored(2)
    clock.step()
    clock.end()
    assert (clock.training_seconds, clock.scoring_seconds) == (3, 2)
    passes(1000)
    assert clock.training_seconds == 3
    clock.begin()
    passes(4)
    clock.step()
    passes(3600)  # an exception, and a night
    clock.begin()
    passes(1)
    assert (clock.training_seconds, clock.scoring_seconds) == (8, 2)


def test_run_json_counts_every_call_and_no_pause_between_them(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer, begin = build(tmp_path, {}, max_steps=3), time.monotonic()
    breaking = Break()
    trainer.add_callback(breaking)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(breaking)
    time.sleep(1)
    trainer.train()
    trainer.train()
    record = json.loads((tmp_path / "ica" / "run.json").read_text())
    assert record["refreshes"] == 3 and record["scored_rows"] == 66
    assert 0 < record["training_seconds"] + record["scoring_seconds"] < time.monotonic() - begin - 1
