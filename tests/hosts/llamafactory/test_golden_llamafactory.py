"""The golden runs of LLaMA-Factory's trainers."""

import pytest

pytest.importorskip("llamafactory")

import tiny  # noqa: E402
from golden import PLAIN, block, check_golden  # noqa: E402
from llamafactory_harness import LORA, Maker  # noqa: E402

# Larger steps would amplify how a CPU rounds.
GENTLE = {"learning_rate": 0.002}
RUNS = {
    "sft": ("sft", tiny.sft_rows, {**LORA, "lora_target": "q_proj,v_proj,down_proj"}, block(refresh_interval=3)),
    "dpo": ("sigmoid", tiny.pair_rows, GENTLE, block(refresh_interval="epoch", length_normalize=False)),
}


@pytest.mark.parametrize("name", RUNS)
def test_golden(tmp_path, tiny_model, name):
    kind, rows, settings, ica = RUNS[name]
    maker = Maker(tmp_path, tiny_model, kind, rows(12), optim="sgd", num_train_epochs=2, **{**PLAIN, **settings})
    check_golden(f"llamafactory-{name}", maker(ica=ica))
