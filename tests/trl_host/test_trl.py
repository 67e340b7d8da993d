"""transformers' and TRL's own trainer classes with `ica_plugin.attach`."""

import pytest
import trl_harness
from checks import check_gradients
from trl_harness import Maker

ROWS = {
    "transformers": lambda: trl_harness.sft_rows(8),
    "sft": lambda: trl_harness.sft_rows(8),
    "dpo": lambda: trl_harness.pair_rows(8),
    "ipo": lambda: trl_harness.pair_rows(8),
    "hinge": lambda: trl_harness.pair_rows(8),
    "simpo": lambda: trl_harness.pair_rows(8),
    # Its NLL term averages a batch over tokens: equal lengths make it a mean of rows.
    "orpo": lambda: trl_harness.pair_rows(8, equal=True),
}


@pytest.mark.parametrize("kind", ROWS)
def test_gradients(tmp_path, kind):
    error = check_gradients(Maker(tmp_path, kind, ROWS[kind]()), tmp_path, token_mean=kind in ("sft", "transformers"))
    print(kind, error)
