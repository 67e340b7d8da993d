"""Ranks that hold other data than each other are told apart before anything is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ica_plugin.errors import ICAError
from ica_plugin.run import ranks as ranks_module
from ica_plugin.run.ranks import Ranks
from processes import torchrun
from runs import ROWS, build, tokenised


def fake_ranks(monkeypatch, others: list) -> Ranks:
    """Rank 0 of several; what the others would send is given."""
    monkeypatch.setattr(ranks_module, "gather_object", lambda here: [*here, *((other, None) for other in others)])
    return Ranks(SimpleNamespace(process_index=0, num_processes=1 + len(others), is_main_process=True))


def as_sent(facts: dict) -> dict:
    return json.loads(json.dumps(facts))


def test_facts_are_compared(monkeypatch):
    facts = {"train rows": "a", "holdout": None, "block": {"k": 3, "band": (0.25, 0.75)}}
    fake_ranks(monkeypatch, [as_sent(facts)]).agree(facts)
    with pytest.raises(ICAError, match="rank 2 holds other data than rank 0: train rows, block differ"):
        fake_ranks(monkeypatch, [as_sent(facts), {"train rows": "b", "holdout": None}]).agree(facts)


def test_shares_are_put_together_in_order(monkeypatch):
    rows = list(range(7))
    of = [Ranks(SimpleNamespace(process_index=rank, num_processes=3, is_main_process=rank == 0)) for rank in range(3)]
    shares = [[10 * row for row in rank.share(rows)] for rank in of]
    assert of[0].joined(shares, 7) == [10 * row for row in rows]
    assert of[0].any(False) is False if of[0].count == 1 else True


@pytest.mark.slow
@pytest.mark.parametrize("what", ["order", "holdout"])
def test_a_rank_with_other_rows_stops_all(tmp_path, what):
    done = torchrun(__file__, 2, tmp_path, what)
    assert done.returncode != 0
    name = "train rows" if what == "order" else "holdout"
    assert f"rank 1 holds other data than rank 0: {name} differ" in done.stderr
    assert not (tmp_path / "ica").exists() and "trained" not in done.stdout


if __name__ == "__main__":
    import os

    folder, what = Path(sys.argv[1]), sys.argv[2]
    other = int(os.environ["RANK"]) == 1
    train = tokenised(ROWS, 0).select(reversed(range(ROWS))) if other and what == "order" else tokenised(ROWS, 0)
    trainer = build(folder, {}, train=train, holdout=tokenised(6, 8 if other and what == "holdout" else 9), max_steps=2)
    trainer.train()
    print("trained")
