import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402

import tiny_vision  # noqa: E402


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Path:
    """A model folder with a random Qwen2-VL and its processor."""
    return tiny_vision.save_qwen(tmp_path_factory.mktemp("qwen"))
