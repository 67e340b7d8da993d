"""What a run says of itself in the log."""

from __future__ import annotations

import numpy as np
import pytest

from checks import write_weights
from runs import ROWS, run


@pytest.mark.parametrize(
    ("spread", "settings", "says"),
    [
        (0.0, {}, ""),
        (0.5, {}, "under AdamW these weights shorten the step to about 0.9"),
        (2.0, {}, "under AdamW these weights shorten the step to about 0."),
        (2.0, {"optim": "sgd"}, ""),
        (2.0, {"apply": "sample"}, ""),
    ],
)
def test_what_adam_does_is_said(tmp_path, capfd, spread, settings, says):
    weights = np.exp(spread * np.random.default_rng(0).normal(size=ROWS))
    block = {
        "weights": str(write_weights(tmp_path / "w.parquet", weights)),
        **{k: v for k, v in settings.items() if k == "apply"},
    }
    run(tmp_path, block, max_steps=1, **{k: v for k, v in settings.items() if k != "apply"})
    said = capfd.readouterr().err
    assert ("shorten the step" in said) == bool(says) and says in said
