"""Nothing that is read can run: no unpickling, no code from data, no remote code but the host's config asks for it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ica_plugin.errors import ICAError
from ica_plugin.run.checkpoint import STATE_FILE
from runs import build, run

ROOT = Path(__file__).parents[1]


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bandit_finds_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "bandit", "-q", "-f", "json", "-c", str(ROOT / "pyproject.toml"), "-r", str(ROOT / "ica_plugin")],
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    assert found["metrics"]["_totals"]["loc"] > 1000 and found["results"] == []


@pytest.mark.parametrize("ending", [".pkl", ".pt", ".bin", ".parquet", ".csv", ".jsonl"])
def test_weights_are_never_unpickled(tmp_path, ending):
    file = tmp_path / f"weights{ending}"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ICAError):
        build(tmp_path, {"weights": str(file)})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", [".pkl", ".json", ".jsonl", ".parquet", ".arrow"])
def test_a_holdout_is_never_unpickled(tmp_path, ending):
    from ica_plugin import attach

    file = tmp_path / f"holdout{ending}"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ICAError):
        attach(build(tmp_path, None), {"holdout": str(file)})
    assert not (tmp_path / "ran").exists()


def test_a_holdout_s_loading_script_is_not_run(tmp_path):
    from ica_plugin import attach

    folder = tmp_path / "holdout"
    folder.mkdir()
    (folder / "holdout.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ICAError):
        attach(build(tmp_path, None), {"holdout": str(folder)})
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_s_state_is_never_unpickled(tmp_path):
    run(tmp_path, {}, max_steps=1, save_strategy="steps", save_steps=1)
    (tmp_path / "checkpoint-1" / STATE_FILE).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ICAError, match="is damaged"):
        run(tmp_path, {}, resume=str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "ran").exists()
