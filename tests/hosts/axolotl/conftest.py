import gc
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import maker  # noqa: E402, F401


@pytest.fixture(autouse=True)
def frozen_imports():
    """Axolotl collects garbage at each step: most of the time, but for what is frozen."""
    pytest.importorskip("axolotl.train")
    gc.freeze()
    yield
    gc.unfreeze()
