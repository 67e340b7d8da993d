"""Influence: does a step on the row lower the holdout loss, by gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..errors import ICAError
from ..policy.gradients import mean_gradient, trained_parameters
from .context import ScoringContext
from .needs import Needs

NAME = "influence"
SOURCE = "LESS, arXiv 2402.04333, eq. 2 and 3"
NEEDS = Needs(adapter="influence takes gradients over the adapter's parameters", gradients=True)

Gradient = list[torch.Tensor]


def score(context: ScoringContext) -> np.ndarray:
    """`Γ(∇L(row)) · ∇L(holdout)` over the adapter's parameters: LESS (arXiv 2402.04333, eq. 2 and 3) at the current policy.

    L is the row's mean token loss, for pairs the DPO loss (SimPO's without γ with `length_normalize`), and L(holdout) the mean
    over the holdout rows. Γ is the identity (the influence of one SGD step), or with `influence.adam` the Adam direction
    of the row's gradient given the optimizer's moments. LESS sums over checkpoints, projects the gradients and divides by
    their norms; here one policy is scored, nothing is projected, and norms count.

    Returns:
        float64 [n]; positive where a step on the row lowers the holdout loss. Negative gradient for undesirable rows.

    Raises:
        ICAError: an optimizer without Adam's moments.
    """
    if "holdout_gradient" not in context.once:
        context.once["holdout_gradient"] = mean_gradient(context.row_gradients(context.shown), len(context.shown))
    target = context.once["holdout_gradient"]
    direction = _adam(context) if context.config.influence.adam else lambda gradient: gradient
    result = np.full(len(context.rows), np.nan)
    for i, gradient in enumerate(context.row_gradients(context.examples)):
        if gradient is not None:
            gradient = direction([context.sign[i] * g for g in gradient])
            result[i] = sum(float((g.double() * t.double()).sum()) for g, t in zip(gradient, target, strict=True))
    return result


def truncated(scores: np.ndarray, quantiles: tuple[float, float] | None) -> np.ndarray:
    """The truncated influence function (arXiv 2510.13212): very high influence is over-scoring, and the middle is of value.

    Scores outside of the two quantiles, on either side, become the lowest score inside; the public text does not say what
    they become.

    Args:
        scores: float64 [n] of the rows scored together.
        quantiles: `influence.truncate`; None leaves the scores as they are.
    """
    finite = np.isfinite(scores)
    if quantiles is None or not finite.any():
        return scores
    low, high = np.quantile(scores[finite], quantiles)
    inside = finite & (scores >= low) & (scores <= high)
    return np.where(finite & ~inside, scores[inside].min() if inside.any() else low, scores)


def _adam(context: ScoringContext) -> Callable[[Gradient], Gradient]:
    """Gradient → `m̂ / (√v̂ + ε)` after one Adam update with it, from the optimizer's moments (zero before the first step)."""
    parameters = trained_parameters(context.engine.model)
    optimizer = context.optimizer
    states = optimizer.state if optimizer is not None else {}
    group = optimizer.param_groups[0] if optimizer is not None else {}
    (beta1, beta2), epsilon = group.get("betas", (0.9, 0.999)), group.get("eps", 1e-8)
    moments = []
    for parameter in parameters:
        state = states.get(parameter) or {}
        first, second = state.get("exp_avg", torch.zeros_like(parameter)), state.get("exp_avg_sq", torch.zeros_like(parameter))
        if (state and "exp_avg" not in state) or first.shape != parameter.shape or second.shape != parameter.shape:
            raise ICAError(
                f"ica.influence.adam: the optimizer {type(optimizer).__name__} does not keep Adam's moments in the parameters' shapes. "
                "Use `optimizer: adamw_torch`, or leave `adam` out."
            )
        moments.append((first.float(), second.float(), int(state.get("step", 0)) + 1))

    def direction(gradient: Gradient) -> Gradient:
        return [
            (beta1 * m + (1 - beta1) * g)
            / (1 - beta1**t)
            / (((beta2 * v + (1 - beta2) * g**2) / (1 - beta2**t)).sqrt() + epsilon)
            for g, (m, v, t) in zip(gradient, moments, strict=True)
        ]

    return direction
