"""Weights → gradients: an identity in the forward pass whose backward multiplies each row's gradient.

For a loss that is a mean of per-row (or per-token) terms this is exactly the weighted loss, whatever code computes
it: losses reduced inside the host, fused linear cross-entropy, preference losses with a reference model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ICAError
from ..policy.decoder import decoder_of, output_embedding


class _ScaleGradient(torch.autograd.Function):
    """Identity forward; backward multiplies the gradient by `weights`, broadcast over trailing dimensions."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, weights: torch.Tensor, scaled: Callable[[], None]) -> torch.Tensor:
        ctx.save_for_backward(weights)
        ctx.scaled = scaled
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        ctx.scaled()
        # The product is taken in float32 and rounded once, without a float32 copy of the gradient.
        return torch.mul(gradient, weights, out=torch.empty_like(gradient)), None, None


def scale_gradient(value: torch.Tensor, weights: torch.Tensor, scaled: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Return `value` unchanged; in the backward pass its gradient is multiplied by `weights`.

    Args:
        value: [N, T, ...].
        weights: float32 [N] (per row) or [N, T] (per position).
        scaled: called when a gradient came and was scaled.
    """
    shape = weights.shape + (1,) * (value.dim() - weights.dim())
    return _ScaleGradient.apply(value, weights.to(value.device).reshape(shape), scaled)


def trains_output_embedding(model: nn.Module) -> bool:
    """Whether any weight of the model's output embedding is trained."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = output_embedding(base)
    return head is not None and any(p.requires_grad for p in head.parameters())


class GradientInjection:
    """Hooks a model so that a training forward inside `scaling(...)` has its gradient scaled.

    The hook sits on the decoder's last hidden state while the output embedding is frozen (LoRA, QLoRA): exact, cheap,
    and on the way of fused losses too. Where the output embedding is trained, it sits on the logits, since the
    embedding's own gradient must be scaled as well; a fused loss never computes them, which `scaling` notices. Which of
    the two is looked at anew for every micro-batch.
    """

    def __init__(self, model: nn.Module):
        """Args: model: the policy, without distributed wrappers."""
        self._model = model
        self.on_logits = False
        self._weights: torch.Tensor | None = None
        self._micro_batch = self._passes = 0
        self._without_gradient: set[int] = set()  # micro-batches that passed forward and not yet back
        self._hooked: nn.Module | None = None
        self._handle: Any = None
        self._follow_model()

    def _follow_model(self) -> None:
        """Hook what the gradient passes now: what is trained may change during a run (a callback that unfreezes the head)."""
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        head = output_embedding(base)
        if head is None:
            raise ICAError(
                f"{type(base).__name__} has no output embedding, so its rows cannot be weighted: ica_plugin needs a causal language model."
            )
        decoder = decoder_of(base)
        self.on_logits = decoder is base or trains_output_embedding(self._model)
        module = head if self.on_logits else decoder
        if module is not self._hooked:
            if self._hooked is not None:
                self._handle.remove()
            self._hooked, self._handle = module, module.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    @contextmanager
    def scaling(self, weights: torch.Tensor) -> Iterator[None]:
        """Scale the gradients of every training forward inside the block.

        Args:
            weights: float32 [B] (rows; a batch of 2B is chosen then rejected) or [B, T] (the weight of the row of each
                token; position t predicts token t + 1 and carries its weight).

        Raises:
            ICAError: no forward with gradient passed the hook: the run would train unweighted.
        """
        self._follow_model()
        self._weights, self._passes = weights, 0
        self._micro_batch += 1
        try:
            yield
        finally:
            self._weights = None
        if not self._passes:
            where = "output embedding, which is trained here," if self.on_logits else "decoder"
            raise ICAError(
                f"a training forward did not pass through the model's {where} so its gradient was not weighted; the run "
                "stops rather than train silently unweighted. With a fused linear cross-entropy (Liger, cut-cross-entropy) "
                "freeze the output embedding (LoRA without `lm_head` in its targets) or switch the fused loss off."
            )

    def check_gradients(self) -> None:
        """To be called before an optimizer step: the gradient of every micro-batch so far went through the hook.

        Raises:
            ICAError: one did not, since the loss takes its activations elsewhere (distillation from `hidden_states`).
        """
        missing, self._without_gradient = len(self._without_gradient), set()
        if missing:
            raise ICAError(
                f"the gradient of {missing} micro-batch(es) did not come back through the model's "
                f"{'output embedding' if self.on_logits else 'last hidden state'}, so it was not weighted: this trainer's loss takes "
                "its activations elsewhere. The run stops rather than train silently unweighted; remove the `ica:` block."
            )

    @torch.compiler.disable
    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._weights is None or not torch.is_grad_enabled():
            return output
        value = output if torch.is_tensor(output) else output[0]
        if not value.requires_grad:
            return output
        micro_batch = self._micro_batch
        scaled = scale_gradient(value, _fit(self._weights, value), lambda: self._without_gradient.discard(micro_batch))
        self._without_gradient.add(micro_batch)
        self._passes += 1
        if torch.is_tensor(output):
            return scaled
        if isinstance(output, tuple):
            return (scaled, *output[1:])
        if getattr(output, "last_hidden_state", None) is not value:
            raise ICAError(f"{type(module).__name__} returns no last hidden state first, so its rows cannot be weighted.")
        output.last_hidden_state = scaled
        return output


def _fit(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The weights of a batch for the rows, or the predictions, of a forward's `value` [N, T, ...]."""
    rows = value.shape[0]
    if weights.dim() == 1 and rows == len(weights):
        return weights
    if weights.dim() == 1 and rows == 2 * len(weights):
        return weights.repeat(2)
    if weights.dim() == 2 and value.shape[:2] == weights.shape:
        return torch.cat([weights[:, 1:], weights[:, -1:]], dim=1)
    raise ICAError(
        f"a training forward has shape {tuple(value.shape[:2])} but the batch has weights {tuple(weights.shape)}: rows "
        "and weights cannot be matched. Switch padding-free batches (`padding_free`) off."
    )
