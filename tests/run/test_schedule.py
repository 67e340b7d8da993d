"""When a refresh is due, event by event, without a trainer."""

from __future__ import annotations

import pytest

from ica_plugin.config import parse_config
from ica_plugin.run.schedule import Schedule


def steps_of(block: dict, total: int, epoch: int) -> list[int]:
    """Steps before which a run of `total` steps, `epoch` to an epoch, refreshes."""
    schedule = Schedule(parse_config({"holdout": "x", **block}), scores=True)
    schedule.begin(total)
    found = []
    for step in range(total):
        if step % epoch == 0:
            schedule.begin_epoch()
        if schedule.take(step):
            found.append(step)
        schedule.end_step(step + 1)
    return found


@pytest.mark.parametrize(
    "block, steps",
    [
        ({}, [0]),
        ({"refresh_interval": "epoch"}, [0, 6]),
        ({"refresh_interval": 4}, [0, 4, 6, 10]),
        ({"refresh_interval": 4, "refresh_scope": "all"}, [0, 4, 8]),
        ({"refresh_interval": 0.25}, [0, 3, 6, 9]),
    ],
)
def test_steps(block, steps):
    assert steps_of(block, 12, 6) == steps


def test_given_weights_are_never_renewed():
    schedule = Schedule(parse_config({"weights": "w.csv", "refresh_interval": 1}), scores=False)
    schedule.begin(4)
    schedule.begin_epoch()
    schedule.end_step(1)
    assert not schedule.take(1)


def test_a_resumed_run_looks_at_the_rows_to_come_inside_a_window_alone():
    block = parse_config({"holdout": "x", "refresh_interval": 4})
    for step, mid_epoch, expected in ((2, True, (True, False)), (4, True, (False, True)), (6, False, (False, True))):
        schedule = Schedule(block, scores=True)
        schedule.begin(12)
        schedule.resume({"step": step, "last_refresh_step": 4 if step > 4 else 0, "due": step == 4}, mid_epoch)
        schedule.begin_epoch()
        assert (schedule.unsure, schedule.due) == expected
        if schedule.unsure:
            assert schedule.steps_to_come(step) == 2


def test_a_shorter_interval_than_the_checkpoint_s_is_due_at_once():
    schedule = Schedule(parse_config({"holdout": "x", "refresh_interval": 2}), scores=True)
    schedule.begin(12)
    schedule.resume({"step": 3, "last_refresh_step": 0, "due": False}, mid_epoch=True)
    assert schedule.due and not schedule.unsure
