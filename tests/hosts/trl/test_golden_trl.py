"""The golden runs of TRL's trainers."""

import pytest

import tiny
from golden import PLAIN, block, check_golden
from trl_harness import Maker, sft_rows


def pair_rows(n: int) -> list[dict]:
    """Pairs as text, which every version of TRL ends alike; of conversations TRL 0.24 ends each answer twice."""
    tokenizer = tiny.make_tokenizer()
    return [
        {
            "prompt": tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True),
            "chosen": row["chosen"]["content"],
            "rejected": row["rejected"]["content"],
        }
        for row in tiny.pair_rows(n)
    ]


# Larger steps would amplify how a CPU rounds.
GENTLE = {"learning_rate": 0.002}
RUNS = {
    # Packed rows are weighted by token, and rows that a bin holds together are examples of their own.
    "sft": (sft_rows, {"packing": True, "packing_strategy": "bfd", "max_length": 96}, block(refresh_interval="epoch")),
    "dpo": (pair_rows, GENTLE, block(refresh_interval=3, length_normalize=False)),
}


@pytest.mark.parametrize("kind", RUNS)
def test_golden(tmp_path, kind):
    rows, settings, ica = RUNS[kind]
    data = rows(18)
    maker = Maker(tmp_path, kind, data[:12], data[12:], optim="sgd", num_train_epochs=2, **{**PLAIN, **settings})
    check_golden(f"trl-{kind}", maker(ica=ica))
