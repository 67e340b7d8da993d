"""The golden runs of Axolotl's trainers."""

import pytest

pytest.importorskip("axolotl")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

import tiny  # noqa: E402
from golden import PLAIN, block, check_golden  # noqa: E402

SETTINGS = {"optimizer": "sgd", "shuffle_merged_datasets": False, "num_epochs": 2, **PLAIN}


@pytest.fixture
def adapter(tmp_path):
    """A saved LoRA that is not zero, since Axolotl does not seed a new one."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get_peft_model(tiny.make_model(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_golden_of_packed_lora(maker, adapter):
    lora = {"adapter": "lora", "lora_model_dir": str(adapter), "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    make = maker("sft", tiny.sft_rows(14, turns=2), sample_packing=True, sequence_len=192, **lora, **SETTINGS)
    check_golden("axolotl-sft", make(ica=block(refresh_interval=3), micro_batch=1))


def test_golden_of_dpo(maker):
    make = maker("dpo", tiny.pair_rows(12), **SETTINGS)
    check_golden("axolotl-dpo", make(ica=block(refresh_interval="epoch", length_normalize=False)))
