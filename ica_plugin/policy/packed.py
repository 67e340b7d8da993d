"""The packed path: many sequences as one tree in one forward, each shared beginning computed once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ..data.store import Sequence
from .decoder import decoder_of
from .logits import label_logprobs
from .memory import Budget
from .precision import Autocast, one_forward
from .trees import Tree, grow, split_into_trees

Attention = Literal["segments", "dense"]


# What a forward costs however few tokens it has, in tokens: launches on a GPU (and unpacking 4-bit weights).
FORWARD_TOKENS = {"cpu": 16, "cuda": 512}


# Attention by segments takes this many tokens at a time, so that a long segment skips most of what comes after a token.
SEGMENT_TOKENS = 256


# Dense attention runs at about a third of the speed of the matrix products.
DENSE_SLOWDOWN = 3


# A window under this is shorter than rows are.
SHORTEST_WINDOW = 32


_BRANCHES: list[tuple[slice, torch.Tensor, torch.Tensor]] | None = None


class PackedPath:
    """Trees of sequences through the model's public interface.

    A token sees its own path and no sibling, in one of two ways. `segments`: an attention function registered with
    transformers computes each segment against its path, and nothing else. `dense`: a 4-D boolean mask with SDPA, whose
    cost grows with the square of the tree. A tree that is a single path needs neither: plain causal attention, without a
    mask, which SDPA has its fastest kernels for.

    Args:
        model: the policy.
        base: the policy without PEFT's wrapper.
        device: where inputs go; see `PaddedPath`.
        attention: which of the two.
        autocast: makes the context of the run's precision.
    """

    def __init__(
        self, model: nn.Module, base: nn.Module, device: torch.device, attention: Attention, autocast: Autocast = nullcontext
    ):
        self._model = model
        self._autocast = autocast
        self._decoder = decoder_of(base)
        self._device = device
        self.attention = attention
        self._configs = _attention_configs(model)
        self._width = base.config.get_text_config().hidden_size
        self._window = sliding_window(base.config.get_text_config())

    def split(self, sequences: list[np.ndarray], predictions: np.ndarray, budget: Budget) -> list[list[int]]:
        """Divide sequences into trees: see `split_into_trees`.

        A sliding window that a tree's longest path fits is full attention there. A longer sequence is a tree of its own, which
        the model's own attention takes as an ordinary row.
        """
        short = [i for i, tokens in enumerate(sequences) if self._window is None or len(tokens) <= self._window]
        trees = split_into_trees(
            [sequences[i] for i in short],
            predictions[short],
            cost=self._cost,
            max_tokens=budget.tokens,
            max_predictions=budget.predictions,
        )
        alone = sorted(set(range(len(sequences))) - set(short))
        return [*([short[i] for i in tree] for tree in trees), *([i] for i in alone)]

    def _cost(self, tokens: np.ndarray) -> np.ndarray:
        # A decoder layer multiplies 12 H² weights per token and attention 2 H per pair of tokens.
        pairs = DENSE_SLOWDOWN * tokens**2 / (6 * self._width) if self.attention == "dense" else 0
        return FORWARD_TOKENS.get(self._device.type, FORWARD_TOKENS["cuda"]) + tokens + pairs

    def token_logprobs(self, sequences: list[Sequence]) -> list[np.ndarray]:
        """float32 [scored tokens] log-probs of each sequence's scored tokens. Sequences in the order of `split`."""
        tree = grow([s.tokens for s in sequences])
        positions = [np.flatnonzero(s.scored) for s in sequences]
        predicted_at = np.concatenate([path[at - 1] for path, at in zip(tree.paths, positions, strict=True)])
        if len(predicted_at) == 0:
            return [np.zeros(0, np.float32)] * len(sequences)
        nodes, rows = np.unique(predicted_at, return_inverse=True)
        labels = np.concatenate([s.tokens[at] for s, at in zip(sequences, positions, strict=True)])
        logits = self._forward(self._model, tree, logits_to_keep=_indices(nodes)).logits[0]
        if len(logits) != len(nodes):
            raise RuntimeError(f"asked for logits at {len(nodes)} positions, got {len(logits)}")
        at, labels = _indices(rows).to(logits.device), _indices(labels).to(logits.device)
        values = label_logprobs(logits, at, labels).cpu().numpy()
        return np.split(values, np.cumsum([len(at) for at in positions])[:-1])

    def embeddings(self, sequences: list[Sequence]) -> np.ndarray:
        """float32 [n, H]: see `Engine.embeddings`. Prompts in the order of `split`."""
        tree = grow([sequence.prompt for sequence in sequences])
        hidden = self._forward(self._decoder, tree).last_hidden_state[0].float()
        pooled = []
        for path in tree.paths:
            weight = torch.arange(1, len(path) + 1, dtype=torch.float32, device=hidden.device)
            # A product and a sum: a matrix product would be in half precision within an autocast region of the caller's.
            pooled.append((weight[:, None] * hidden[_indices(path).to(hidden.device)]).sum(0) / weight.sum())
        return torch.stack(pooled).cpu().numpy()

    def _forward(self, module: nn.Module, tree: Tree, **kwargs: Any) -> Any:
        inputs = {"input_ids": self._to_device(tree.tokens)[None], "position_ids": self._to_device(tree.positions)[None]}
        if self.attention == "dense" and not tree.is_path:
            inputs["attention_mask"] = _mask(self._to_device(tree.ends))[None, None]
        with self._attending(tree), one_forward(self._autocast):
            return module(**inputs, use_cache=False, **kwargs)

    @contextmanager
    def _attending(self, tree: Tree) -> Iterator[None]:
        """The configs name our attention; layers look it up at every call. Afterwards they name the run's own."""
        global _BRANCHES
        by_segments = self.attention == "segments" and not tree.is_path
        if by_segments:
            _BRANCHES = []
            for path, (start, stop) in zip(tree.paths, tree.segments, strict=True):
                keys = _indices(path)
                for begin in range(start, stop, SEGMENT_TOKENS):
                    end = min(begin + SEGMENT_TOKENS, stop)
                    seen = len(path) - (stop - end)
                    _BRANCHES.append((slice(begin, end), keys[:seen], torch.from_numpy(_sees(seen, end - begin))))
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = TREE_ATTENTION if by_segments else "sdpa"
            yield
        finally:
            _BRANCHES = None
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return _indices(array).to(self._device)


def _indices(array: np.ndarray) -> torch.Tensor:
    """int64 on the CPU, where indices into a tensor of any device may be."""
    return torch.tensor(array, dtype=torch.int64)


def sliding_window(config: Any) -> int | None:
    """Tokens back to which attention reaches, the token itself included, in at least some layers; None if all reach everywhere.

    Args:
        config: the text model's.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    unused = getattr(config, "use_sliding_window", True) is False or (kinds and "sliding_attention" not in kinds)
    return None if window is None or unused else int(window)


def why_not_packed(base: nn.Module) -> str | None:
    """What in a model's config or code rules the packed path out; None if nothing does.

    This names the known reasons; that siblings really do not see each other is then tried on the model itself.
    """
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    window = sliding_window(config)
    if window is not None and window < SHORTEST_WINDOW:
        return f"its attention has a sliding window of {window} tokens only"
    if kinds or getattr(config, "attention_chunk_size", None):
        return f"it has layers other than full attention ({', '.join(sorted(kinds)) or 'chunked attention'})"
    if not getattr(base, "_supports_sdpa", False):
        return "its attention does not run on SDPA"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        return "its position embedding depends on the longest row of a batch"
    taken = inspect.signature(base.forward).parameters
    missing = [name for name in ("position_ids", "logits_to_keep") if name not in taken]
    return f"its forward takes no `{missing[0]}`" if missing else None


def _attention_configs(model: nn.Module) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())


def _mask(ends: torch.Tensor) -> torch.Tensor:
    """bool [T, T] on the device of `ends`: True where the row's token attends to the column's, see `Tree.ends`."""
    at = torch.arange(len(ends), device=ends.device)
    return (at[:, None] >= at).logical_and_(at[:, None] < ends)


def _sees(length: int, new: int) -> np.ndarray:
    """bool [new, length]: the last `new` tokens of a path against the whole path, causally."""
    return np.tri(new, length, length - new, dtype=bool)


def _tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the current tree, one segment at a time: query [1, heads, T, D], key and value [1, kv heads, T, D]."""
    window = kwargs.pop("sliding_window", None)
    if window is not None and any(len(path) > window for _, path, _ in _BRANCHES or ()):
        raise NotImplementedError("tree attention over a path longer than the sliding window")
    changes = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if changes or attention_mask is not None or _BRANCHES is None:
        raise NotImplementedError(f"tree attention with {changes or 'a mask'}")
    groups = query.shape[1] // key.shape[1]
    output = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
    for segment, path, sees in _BRANCHES:
        output[:, :, segment] = scaled_dot_product_attention(
            query[:, :, segment],
            key[:, :, path],
            value[:, :, path],
            attn_mask=sees.to(query.device),
            scale=scaling,
            enable_gqa=groups > 1,
        )
    return output.transpose(1, 2).contiguous(), None


TREE_ATTENTION = "ica_tree"


AttentionInterface.register(TREE_ATTENTION, _tree_attention)
