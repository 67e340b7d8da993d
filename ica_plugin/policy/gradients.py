"""Loss of one row with its gradient over the trained parameters, for scorers that need more than log-probs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ..data.store import Example, Sequence
from ..scorers.context import ScoringContext
from .adapters import require_adapter, without_adapter


def row_loss(
    model: nn.Module, example: Example, *, device: torch.device, beta: float, reference: np.ndarray | None
) -> torch.Tensor:
    """The loss of `context.losses` for one row, differentiable: mean token loss, or −log σ(β m) for a pair.

    Args:
        model: the policy.
        example: a row with supervised tokens.
        device: where inputs go.
        beta: of pairs.
        reference: float64 [2], the pair's log-probs under the reference; None for the margin of mean log-probs.

    Returns:
        float32 scalar.
    """
    sums = [_logprob_sum(model, sequence, device) for sequence in example.sequences]
    tokens = [int(sequence.scored.sum()) for sequence in example.sequences]
    if example.kind != "pair":
        return -sums[0] / tokens[0]
    if reference is None:
        margin = sums[0] / tokens[0] - sums[1] / tokens[1]
    else:
        margin = sums[0] - sums[1] - float(reference[0] - reference[1])
    return -nn.functional.logsigmoid(beta * margin)


def pair_references(context: ScoringContext, examples: list[Example]) -> list[np.ndarray | None]:
    """What `row_loss` takes as each row's `reference`: None for SFT, unpaired and length-normalised rows.

    Raises:
        ICAError: pairs that need a reference, and a policy without an adapter to switch off.
    """
    if context.kind != "pair" or context.length_normalize:
        return [None] * len(examples)
    require_adapter(context.engine.model, "the DPO loss of a pair takes the policy with its adapter switched off as reference")
    with without_adapter(context.engine.model):
        return list(context.logprob_sums(examples))


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the run trains, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def row_gradients(context: ScoringContext, examples: list[Example]) -> Iterator[list[torch.Tensor] | None]:
    """Gradient of each row's loss over `trained_parameters`, float32, in their shapes; None for a row that cannot be scored.

    One row at a time, in eval mode and without gradient checkpointing. Neither `.grad` nor any random state changes.
    """
    model = context.engine.model
    references = pair_references(context, examples)
    for example, reference in zip(examples, references, strict=True):
        if not example.can_be_scored:
            yield None
            continue
        with context.engine.undisturbed(gradient=True):
            parameters = trained_parameters(model)
            loss = row_loss(model, example, device=context.engine.device, beta=context.beta, reference=reference)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        context.progress(1)
        yield [
            torch.zeros_like(p, dtype=torch.float32) if g is None else g.float() for g, p in zip(found, parameters, strict=True)
        ]


def mean_gradient(context: ScoringContext, examples: list[Example]) -> list[torch.Tensor]:
    """Mean of `row_gradients`: the gradient of the mean loss of the rows."""
    total: list[torch.Tensor] | None = None
    for gradient in row_gradients(context, examples):
        total = gradient if total is None else [t.add_(g) for t, g in zip(total, gradient, strict=True)]
    return [t / len(examples) for t in total]


def _logprob_sum(model: nn.Module, sequence: Sequence, device: torch.device) -> torch.Tensor:
    tokens = torch.from_numpy(sequence.tokens).to(device)
    at = torch.from_numpy(np.flatnonzero(sequence.scored)).to(device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
    logits = model(input_ids=tokens[None], use_cache=False, **({"logits_to_keep": at - 1} if keeps else {})).logits[0]
    logprobs = torch.log_softmax((logits if keeps else logits[at - 1]).float(), dim=-1)
    return logprobs.gather(1, tokens[at, None]).sum()
