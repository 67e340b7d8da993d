"""Which way a model is scored: packed trees where the model is right on them, else padded batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..data.store import Sequence
from ..errors import ICAError
from .packed import PackedPath, why_not_packed
from .padded import PaddedPath
from .precision import Autocast

Path = PaddedPath | PackedPath

# Packed and padded log-probs may differ by this share of their own spread: rounding is far below, a sibling seen far above.
PATHS_AGREE = 0.05

# What a token's log-prob may change by with the tokens after it: rounding of 8-bit kernels is far below, attention to them above.
SEES_AHEAD = 0.3

# Tokens of what two rows of the probe share, and of the third.
STEM, ALONE = 12, 16


def choose_path(
    model: nn.Module, base: nn.Module, device: torch.device, autocast: Autocast, padded: PaddedPath
) -> tuple[Path, str | None]:
    """The fastest path that is right for the model: the packed one is tried against the padded one on a few random tokens.

    Args:
        model: the policy, in eval mode and without gradient.
        base: the policy without PEFT's wrapper.
        device: where inputs go.
        autocast: makes the context of the run's precision.
        padded: the padded path of the model.

    Returns:
        the path, and why it is not a faster one.

    Raises:
        ICAError: the model attends to later tokens (made for embeddings, diffusion, PaliGemma in some versions of transformers).
    """
    probe = _probe(base.config.get_text_config().vocab_size)
    of_rows = padded.token_logprobs(probe)
    expected = np.concatenate(of_rows)
    beginnings = [values[: STEM - 1] for row, values in zip(probe, of_rows, strict=True) if len(row.tokens) > ALONE]
    if np.sqrt(np.mean(np.subtract(*beginnings) ** 2)) > SEES_AHEAD * expected.std():
        raise ICAError(
            f"{type(base).__name__} sees later tokens: two sequences that begin alike have other log-probs in their beginnings. What it "
            "says of a response is no score; ica_plugin needs a causal language model. Give `ica.weights`, or remove the `ica:` block."
        )
    reason = why_not_packed(base)
    if reason is not None:
        return padded, reason
    # Dense attention is one kernel, which is what a GPU wants; on a CPU the fewest operations win.
    for attention in ("segments", "dense") if device.type == "cpu" else ("dense",):
        packed = PackedPath(model, base, device, attention, autocast)
        try:
            error = np.concatenate(packed.token_logprobs(probe)) - expected
        except Exception as caught:
            reason = f"its forward does not take packed trees ({type(caught).__name__}: {caught})"
            continue
        if np.sqrt(np.mean(error**2)) <= PATHS_AGREE * expected.std():
            return packed, None
        reason = "its log-probs of packed trees differ from those of single rows"
    return padded, reason


def describe(path: Path) -> str:
    """The path in the words of the log."""
    if isinstance(path, PaddedPath):
        return "padded batches sorted by length"
    return f"packed trees ({'dense mask' if path.attention == 'dense' else 'attention by segments'}, SDPA)"


def _probe(vocabulary: int) -> list[Sequence]:
    """Sequences of random tokens, sorted: two that share a beginning, a third that shares nothing."""
    rng = np.random.default_rng(0)
    stem, left, right, alone = (rng.integers(vocabulary, size=size) for size in (STEM, 8, 8, ALONE))
    rows = sorted([np.concatenate([stem, left]), np.concatenate([stem, right]), alone], key=lambda row: row.tolist())
    return [Sequence(row, np.arange(len(row)) > 0) for row in rows]
