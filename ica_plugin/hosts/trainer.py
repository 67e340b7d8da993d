"""Attach to a trainer: row ids, weights, and the callback. Every host ends here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch.utils.data import IterableDataset
from transformers import Trainer

from ..callback import ICACallback, model_context
from ..config import ICAConfig, parse_config
from ..errors import ICAError
from ..examples import Example, read_examples
from ..holdout import check_holdout
from ..log import get_logger
from ..row_ids import ROW_IDS, RowIdCollator
from ..weights_file import check_weights, read_weights

# Losses whose value for one row depends on the other rows of the batch or on a running mean over batches.
COUPLED_LOSSES = {"aot", "aot_pair", "aot_unpaired", "bco", "bco_pair"}
LENGTH_NORMALIZED_LOSSES = {"simpo", "orpo", "sigmoid_norm"}


def attach_examples(
    trainer: Trainer,
    config: ICAConfig,
    *,
    read_holdout: Callable[[], tuple[str, list[Example]]] | None,
    weights: Any = None,
) -> ICACallback:
    """Make a trainer train with weights: what all hosts share.

    Adds an integer column to `trainer.train_dataset`, wraps the collator, `compute_loss` and `get_batch_samples` on the
    instance, and adds a callback. The host's loss, sampler, optimizer and logging stay its own.

    Args:
        trainer: before `train()`.
        config: the block.
        read_holdout: returns the holdout's name for messages and its rows; None with given weights.
        weights: float [n], a weight per row of `trainer.train_dataset`, instead of the block's `weights`.

    Raises:
        ICAError: what cannot be weighted exactly, and what to do about it.
    """
    _refuse_what_cannot_be_weighted(trainer)
    train = read_examples(trainer.train_dataset, trainer.data_collator)
    unsupervised = [i for i, row in enumerate(train) if not row.can_be_scored]
    if len(unsupervised) == len(train):
        raise ICAError("no train row has a supervised token; check the dataset's `type` and label masks.")
    if unsupervised:
        get_logger().warning(
            "%d of %d train rows have no supervised token (first: row %d) and get weight 0.",
            len(unsupervised), len(train), unsupervised[0],
        )
    given = holdout = None
    if weights is not None:
        given = check_weights(weights, "weights")
        if given.shape != (len(train),):
            raise ICAError(f"weights: shape {given.shape}, but the trainer has {len(train)} train rows; give one weight per row.")
    elif config.weights is not None:
        given = _configured_weights(trainer, config.weights)
    else:
        source, rows = read_holdout()
        holdout = check_holdout(source, rows, train, model_context(trainer.model))
    callback = ICACallback(
        trainer, config, train, holdout, given=given, length_normalize=_length_normalize(trainer, config)
    )
    _add_row_ids(trainer)
    _wrap_loss(trainer, callback)
    _wrap_batches(trainer, callback)
    trainer.add_callback(callback)
    return callback


def _refuse_what_cannot_be_weighted(trainer: Trainer) -> None:
    if isinstance(trainer.data_collator, RowIdCollator):
        raise ICAError("ica_plugin is attached to this trainer already.")
    dataset = trainer.train_dataset
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "add_column"):
        raise ICAError(
            f"the train dataset is {type(dataset).__name__}: rows of a streaming or iterable dataset have no fixed index to "
            "keep a weight under. Load it as a map-style `datasets.Dataset` (streaming off)."
        )
    if len(dataset) == 0:
        raise ICAError("the train dataset has no rows.")
    coupled = loss_types(trainer) & COUPLED_LOSSES
    if coupled:
        raise ICAError(
            f"the loss `{sorted(coupled)[0]}` couples the rows of a batch, so no single row's gradient can be weighted. "
            "Use a loss that is a mean over rows: sigmoid, ipo, hinge, simpo, orpo, kto."
        )
    kind = trainer.accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ICAError(
            f"{kind.value} is not supported yet: its ranks must run the same forwards together, which scoring does not. "
            "Use one process or DDP (drop `fsdp`/`deepspeed` from the config)."
        )


def loss_types(trainer: Trainer) -> set[str]:
    """Names of the trainer's losses, lower case, as TRL and LLaMA-Factory keep them."""
    names: set[str] = set()
    for holder in (trainer, trainer.args):
        for attribute in ("loss_types", "loss_type"):
            value = getattr(holder, attribute, None)
            names |= {value} if isinstance(value, str) else set(value) if isinstance(value, (list, tuple)) else set()
    class_name = type(trainer).__name__.lower()
    names |= {name for name in ("orpo", "bco") if name in class_name}
    return {str(name).lower() for name in names}


def _length_normalize(trainer: Trainer, config: ICAConfig) -> bool:
    if config.length_normalize is not None:
        return config.length_normalize
    return bool(loss_types(trainer) & LENGTH_NORMALIZED_LOSSES)


def _configured_weights(trainer: Trainer, source: str) -> np.ndarray:
    dataset = trainer.train_dataset
    if source in dataset.column_names:
        return check_weights(dataset[source], f"ica.weights: column `{source}`")
    return read_weights(source, len(dataset))


def _add_row_ids(trainer: Trainer) -> None:
    trainer.train_dataset = trainer.train_dataset.add_column(ROW_IDS, list(range(len(trainer.train_dataset))))
    trainer.data_collator = RowIdCollator(trainer.data_collator)
    host_columns = trainer._set_signature_columns_if_needed

    @functools.wraps(host_columns)
    def with_row_ids() -> None:
        host_columns()
        if ROW_IDS not in trainer._signature_columns:
            trainer._signature_columns = [*trainer._signature_columns, ROW_IDS]

    trainer._set_signature_columns_if_needed = with_row_ids


def _wrap_loss(trainer: Trainer, callback: ICACallback) -> None:
    host_loss = trainer.compute_loss

    @functools.wraps(host_loss)
    def weighted_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = inputs.pop(ROW_IDS, None)
        if not (model.training and torch.is_grad_enabled()):
            return host_loss(model, inputs, *args, **kwargs)
        if rows is None:
            raise ICAError(
                "a training batch came without row ids, so it would train unweighted. The host replaced the train dataset "
                "or the collator after ica_plugin was attached; please report the host and its version."
            )
        with callback.injection.scaling(callback.training_weights(rows)):
            return host_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = weighted_loss


def _wrap_batches(trainer: Trainer, callback: ICACallback) -> None:
    host_batches = trainer.get_batch_samples

    @functools.wraps(host_batches)
    def scored_batches(epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        return host_batches(callback.before_update(epoch_iterator, num_batches), num_batches, *args, **kwargs)

    trainer.get_batch_samples = scored_batches


def prepare_like_train(trainer: Trainer, rows: Any) -> Any:
    """Tokenise raw rows (prompt, chosen, …) as the TRL trainer tokenised its own.

    Args:
        trainer: a TRL trainer.
        rows: `datasets.Dataset` in the columns that the trainer was given.

    Returns:
        the rows in the columns of `trainer.train_dataset`.

    Raises:
        ICAError: the trainer offers no way to prepare rows.
    """
    if hasattr(trainer, "tokenize_row") and not hasattr(trainer, "_prepare_dataset"):  # CPO, ORPO
        from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

        rows = rows.map(maybe_extract_prompt)
        rows = rows.map(maybe_apply_chat_template, fn_kwargs={"processing_class": trainer.processing_class})
        return rows.map(trainer.tokenize_row)
    if hasattr(trainer, "_prepare_dataset"):
        return trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, "holdout")
    raise ICAError(f"{type(trainer).__name__} offers no way to prepare raw rows; give the holdout in the columns of its train dataset.")
