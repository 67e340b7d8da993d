"""Where a causal language model's last hidden state comes from."""

from __future__ import annotations

from torch import nn


def output_embedding(module: nn.Module) -> nn.Module | None:
    """What turns a module's last hidden state into logits; None where it has none."""
    return module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None


def decoder_of(base: nn.Module) -> nn.Module:
    """The module whose last hidden state goes into the output embedding; `base` itself where it names none.

    Some wrappers name a whole language model as their decoder (Llama 4, Kosmos-2), so the search goes on below it.

    Args:
        base: the policy without PEFT's wrapper.
    """
    decoder = base
    while output_embedding(decoder) is not None:
        named = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        inner = getattr(decoder, "model", decoder) if named is decoder else named
        if inner is decoder:
            return base
        decoder = inner
    return decoder
