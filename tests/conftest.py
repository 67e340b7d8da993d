import os
import sys
from pathlib import Path

# Before any host is imported: no network, no trackers, no GPU, and few threads, so that results repeat.
os.environ.update(
    AXOLOTL_DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="disabled",
    CUDA_VISIBLE_DEVICES="",
    TOKENIZERS_PARALLELISM="false",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",
)
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402

import tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model folder with a random two-layer Llama and a chatml tokenizer."""
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def model_for_4_bit(tmp_path_factory) -> Path:
    """The same with layers wide enough for bitsandbytes' blocks of 64."""
    return tiny.save_model(tmp_path_factory.mktemp("model4"), hidden_size=128, intermediate_size=256)
