"""RDS+."""

from __future__ import annotations

import numpy as np
import torch

from ica_plugin.data.store import Example
from scored import (
    make_context,
    score,
)


def test_rds():
    context = make_context("rds")
    context.holdout.hidden_from[2] = frozenset(context.holdout.shown[1:])  # row 2 may be compared with one holdout row alone
    context.holdout.hidden_from[3] = frozenset(context.holdout.shown)
    model = context.engine.model.eval()

    def embedding(row: Example) -> np.ndarray:
        tokens = torch.from_numpy(row.demonstration.tokens)[None]
        with torch.no_grad():
            hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1][0].double().numpy()
        pooled = np.arange(1, len(hidden) + 1) @ hidden
        return pooled / np.linalg.norm(pooled)

    similarity = np.stack([embedding(r) for r in context.train]) @ np.stack([embedding(r) for r in context.holdout.examples]).T
    expected = similarity.max(axis=1)
    expected[2], expected[3] = similarity[2, 0], np.nan
    np.testing.assert_allclose(score(context), expected, atol=1e-5)
