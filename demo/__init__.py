"""The demo: train a small real model twice through `axolotl train`, plainly and with an `ica:` block.

`python -m demo` runs it. `model` says where the model comes from, `data` what it trains on, and `report` what
is printed and drawn at the end.
"""

import logging

for noisy in ("torchao", "torch.utils._pytree", "bitsandbytes"):  # they warn about GPU parts at import
    logging.getLogger(noisy).setLevel(logging.ERROR)
