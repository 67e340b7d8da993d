"""Everything that is hooked on a trainer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import Trainer

from ..data.row_ids import ROW_IDS, RowIdCollator
from ..data.store import Rows
from ..errors import ICAError
from ..run.callback import ICACallback


def _add_row_ids(trainer: Trainer, row_ids: list[Any], rows: Rows) -> None:
    trainer.train_dataset = trainer.train_dataset.add_column(ROW_IDS, row_ids)
    trainer.data_collator = RowIdCollator(trainer.data_collator, rows)
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


def _wrap_checkpoints(trainer: Trainer, callback: ICACallback) -> None:
    # `on_save` comes when a checkpoint is complete for the host: a run killed just before it would resume without our state.
    # The random states are saved before the checkpoint is complete, and only where it can be resumed from.
    host_save, host_load = trainer._save_rng_state, trainer._load_optimizer_and_scheduler

    @functools.wraps(host_save)
    def save(output_dir: str, *args: Any, **kwargs: Any) -> Any:
        callback.save_state(output_dir)
        return host_save(output_dir, *args, **kwargs)

    @functools.wraps(host_load)
    def load(checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        if checkpoint is not None:
            callback.load_state(checkpoint)
        return host_load(checkpoint, *args, **kwargs)

    trainer._save_rng_state, trainer._load_optimizer_and_scheduler = save, load
