"""Loss of one row with its gradient over the trained parameters, for scorers that need more than log-probs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from ..data.store import Example
from ..errors import ICAError
from .engine import Engine, Progress
from .losses import losses
from .memory import is_out_of_memory

# What `row_loss` takes as a row's reference: float64 [2], a pair's log-probs under the reference model; None for no reference.
RowReference = np.ndarray | None


def row_loss(engine: Engine, example: Example, *, beta: float, reference: RowReference) -> torch.Tensor:
    """`losses` of one row with supervised tokens, a differentiable float32 scalar; within `engine.undisturbed(gradient=True)`."""
    sums = torch.stack([engine.padded.label_logprobs([sequence])[0].sum() for sequence in example.sequences])[None]
    against = None if reference is None else torch.as_tensor(reference[None], dtype=sums.dtype, device=sums.device)
    return losses(sums, against, [example], beta)[0]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the run trains, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def row_gradients(
    engine: Engine,
    examples: list[Example],
    references: Sequence[RowReference],
    *,
    beta: float,
    progress: Progress = lambda done: None,
) -> Iterator[list[torch.Tensor] | None]:
    """Gradient of each row's loss over `trained_parameters`, one row at a time and in eval mode; `.grad` does not change.

    Args:
        engine: the policy.
        examples: n rows.
        references: of each row, see `row_loss`.
        beta: of pairs.
        progress: called with the number of tokens done.

    Yields:
        float32, in the parameters' shapes; None for a row that cannot be scored.
    """
    parameters = trained_parameters(engine.model)
    for example, reference in zip(examples, references, strict=True):
        if not example.can_be_scored:
            yield None
            continue
        yield _gradient(engine, example, beta, reference, parameters)
        progress(sum(len(sequence.tokens) for sequence in example.sequences))


def _gradient(
    engine: Engine, example: Example, beta: float, reference: RowReference, parameters: list[nn.Parameter]
) -> list[torch.Tensor]:
    try:
        with engine.undisturbed(gradient=True):
            loss = row_loss(engine, example, beta=beta, reference=reference)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ICAError(
            f"out of memory in the backward of a single row of {example.longest} tokens, which influence, datainf and the training of "
            "a holdout adapter take. Switch gradient checkpointing on, shorten the run's sequence length, or use a scorer "
            "without gradients (docs/scorers.md)."
        ) from error
    return [torch.zeros_like(p, dtype=torch.float32) if g is None else g.float() for g, p in zip(found, parameters, strict=True)]


def mean_gradient(gradients: Iterator[list[torch.Tensor] | None], rows: int) -> list[torch.Tensor]:
    """The gradient of the mean loss of `rows` rows, all of which can be scored, from `row_gradients` of them."""
    total: list[torch.Tensor] | None = None
    for gradient in gradients:
        assert gradient is not None
        total = gradient if total is None else [t.add_(g) for t, g in zip(total, gradient, strict=True)]
    assert total is not None
    return [t / rows for t in total]
