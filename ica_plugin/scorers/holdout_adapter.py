"""The policy's loss less that of a second adapter, tuned on the holdout: what `rho` and `lossdiff` are made of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ICAError
from ..log import get_logger
from ..policy.adapters import adapter_swapped, require_lora
from ..policy.gradients import row_loss
from ..policy.losses import losses
from .context import ScoringContext
from .needs import Needs

# The second adapter's name beside the policy's.
ADAPTER = "ica_holdout"

ROWS_PER_STEP = 8

NEEDS_OF_BOTH = Needs(
    lora="rho and lossdiff put a second LoRA, tuned on the holdout, beside the policy's",
    untouched_base=True,
    trained_adapter=True,
)


def reducible_loss(context: ScoringContext) -> np.ndarray:
    """`L(row; π) − L(row; π_holdout)`: the reducible holdout loss (RHO-Loss, arXiv 2206.07137, eq. 3), for pairs LossDiff
    (arXiv 2510.13212). High where the policy still has to learn what the holdout teaches.

    L is the mean token loss, for pairs the DPO loss with the run's reference (SimPO's without γ with `length_normalize`); the public text of LossDiff leaves the loss open. π_holdout is a LoRA on the same base, trained on the
    holdout before the first scoring or given (`holdout_adapter`), and is kept as it is through the run.

    Returns:
        float64 [n], nats. Negative for undesirable rows.

    Raises:
        ICAError: the adapter at `holdout_adapter.path` cannot be loaded.
    """
    reference = torch.from_numpy(context.reference_sums) if context.loss_has_reference else None
    policy, best = (
        losses(torch.from_numpy(sums), reference, context.examples, context.beta).numpy()
        for sums in (context.sums, _tuned_sums(context))
    )
    return context.sign * (policy - best)


def _tuned_sums(context: ScoringContext) -> np.ndarray:
    """float64 [n, sequences]: log-probs under the holdout model, kept for every row that was scored once."""
    known: dict[int, np.ndarray] = context.kept.setdefault("tuned_sums", {})
    new = [row for row in context.rows if row not in known]
    if new:
        model = context.engine.model
        with context.engine.undisturbed(), adapter_swapped(model, ADAPTER):
            _load_or_train(context)
            model.set_adapter(ADAPTER)
            model.eval()  # modules that were added within the block
            sums = context.logprob_sums([context.beginning(context.train[row]) for row in new])
        known.update(zip(new, sums, strict=True))
    return np.array([known[row] for row in context.rows]).reshape(context.sums.shape)


def _load_or_train(context: ScoringContext) -> None:
    """Put the holdout adapter beside the policy's: from its path, from an earlier refresh, or trained now."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model, settings = context.engine.model, context.config.holdout_adapter
    if settings.path is not None:
        if not (Path(settings.path) / "adapter_config.json").is_file():
            raise ICAError(f"ica.holdout_adapter.path: {settings.path}: no PEFT adapter there (no adapter_config.json).")
        try:
            model.load_adapter(settings.path, ADAPTER)
        except Exception as error:
            raise ICAError(
                f"ica.holdout_adapter.path: {settings.path}: cannot be loaded on this base: {type(error).__name__}: {error}"
            ) from error
        return
    torch.manual_seed(context.config.seed)
    model.add_adapter(ADAPTER, _lora_like(require_lora(model, "the holdout adapter"), settings.r))
    if "adapter" in context.kept:
        set_peft_model_state_dict(model, context.kept["adapter"], adapter_name=ADAPTER)
        return
    _train(context)
    context.kept["adapter"] = {
        name: value.detach().cpu().clone() for name, value in get_peft_model_state_dict(model, adapter_name=ADAPTER).items()
    }


def _lora_like(policy: Any, r: int) -> Any:
    """A plain LoRA of rank r on the matrices that the policy's adapter trains."""
    config = copy.deepcopy(policy)
    plain = {
        "r": r,
        "lora_alpha": 2 * r,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "inference_mode": False,
    }
    for key, value in plain.items():
        setattr(config, key, value)
    return config


def _train(context: ScoringContext) -> None:
    """AdamW steps on batches of holdout rows, the learning rate falling linearly to 0. Rows are visited in shuffled passes."""
    model, settings, rows = context.engine.model, context.config.holdout_adapter, context.shown
    references = context.loss_references(rows)
    model.set_adapter(ADAPTER)
    parameters = [parameter for name, parameter in model.named_parameters() if ADAPTER in name.split(".")]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    rng, order = np.random.default_rng(context.config.seed), list[int]()
    with context.engine.undisturbed(gradient=True):
        for step in range(settings.steps):
            while len(order) < ROWS_PER_STEP:
                order += rng.permutation(len(rows)).tolist()
            batch, order = order[:ROWS_PER_STEP], order[ROWS_PER_STEP:]
            total = 0.0
            for i in batch:
                loss = row_loss(context.engine, rows[i], beta=context.beta, reference=references[i]) / len(batch)
                # Not `backward`, which would also reach what the run trains beside its adapter.
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                    if gradient is not None:
                        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                total += loss.item()
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / settings.steps)
            optimizer.step()
            optimizer.zero_grad()
            if step in (0, settings.steps - 1):
                get_logger().info("holdout adapter: step %d of %d, loss %.4f.", step + 1, settings.steps, total)
