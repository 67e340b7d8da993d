"""DataInf: influence with the inverse Hessian of each LoRA matrix in closed form."""

from __future__ import annotations

import numpy as np
import torch

from ..policy.gradients import mean_gradient
from .context import ScoringContext
from .needs import Needs

NAME = "datainf"
SOURCE = "DataInf, arXiv 2310.00902, eq. 5"
NEEDS = Needs(lora="datainf has a closed form over LoRA's matrices", gradients=True)

# The Hessian is averaged over a sample of train rows, whose gradients are held at once.
HESSIAN_ROWS = 256
HESSIAN_BYTES = 2**30

# λ as a share of the mean squared gradient, as in the paper.
DAMPING = 0.1


def score(context: ScoringContext) -> np.ndarray:
    """DataInf (arXiv 2310.00902, eq. 5), with the sign turned so that a helpful row is positive:

        Σ_l 1/λ_l · [ v_l·g_lk − 1/m Σ_i (v_l·g_li) / (λ_l + |g_li|²) · (g_li·g_lk) ]

    over the adapter's matrices l, with g_li the gradient of row i's loss, v_l that of the mean holdout loss, and the paper's
    λ_l = 0.1 · mean_i |g_li|² / d_l. The m rows i are the train rows, or a sample of 256 (fewer where their gradients would
    take over 1 GB), drawn by `seed` and the same for every refresh and rank. Losses as for `influence`.

    Returns:
        float64 [n].
    """
    if "directions" not in context.once:
        context.once["directions"] = _directions(context)
    directions = context.once["directions"]
    result = np.full(len(context.rows), np.nan)
    for i, gradient in enumerate(context.row_gradients(context.examples)):
        if gradient is not None:
            result[i] = context.sign[i] * sum(float(d @ g.flatten().double()) for d, g in zip(directions, gradient, strict=True))
    return result


def _directions(context: ScoringContext) -> list[torch.Tensor]:
    """The inverse Hessian times the holdout's gradient, float64, of each matrix, flat."""
    target = mean_gradient(context.row_gradients(context.shown), len(context.shown))
    sample = _hessian_rows(context, sum(t.numel() for t in target))
    gradients = [g for g in context.row_gradients([context.beginning(context.train[row]) for row in sample]) if g is not None]
    return [_inverse_hessian(torch.stack([g[i].flatten() for g in gradients]), target[i].flatten()) for i in range(len(target))]


def _hessian_rows(context: ScoringContext, parameters: int) -> list[int]:
    rows = [i for i, row in enumerate(context.train) if row.can_be_scored]
    most = max(1, min(HESSIAN_ROWS, HESSIAN_BYTES // (4 * parameters)))
    if len(rows) <= most:
        return rows
    return sorted(np.random.default_rng(context.config.seed).choice(rows, most, replace=False).tolist())


def _inverse_hessian(gradients: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1/m Σ_i (λ + g_i g_iᵀ)⁻¹ v, each by the Sherman-Morrison formula. `gradients`: [m, d]; `target` v: [d]; float64 [d]."""
    gradients, target = gradients.double(), target.double()
    squares = (gradients**2).sum(dim=1)
    damping = DAMPING * squares.mean() / gradients.shape[1]
    if damping == 0:  # LoRA's A before the first step, whose gradient is zero for every row
        return torch.zeros_like(target)
    share = (gradients @ target) / (damping + squares)
    return (target - share @ gradients / len(gradients)) / damping
