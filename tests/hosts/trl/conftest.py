import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# TRL 0.24 cannot be imported beside transformers 5 but for a repair that LLaMA-Factory brings.
with contextlib.suppress(ImportError):
    import llamafactory.extras.packages  # noqa: F401
