"""How much one scoring forward may hold."""

from __future__ import annotations

MAX_LOGITS = 2**26


def max_predictions(vocabulary: int) -> int:
    """Positions with logits per forward, so that logits stay under 2²⁶ elements (128 MB in bfloat16)."""
    return max(1, MAX_LOGITS // vocabulary)
