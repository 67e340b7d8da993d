"""Everything that is hooked on a trainer, and its undo."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from transformers import Trainer

from ..data.row_ids import ROW_IDS, RowIdCollator
from ..data.store import Rows
from ..errors import ICAError

NOT_THERE = object()


class Run(Protocol):
    """What the hooks call; see `run.callback`."""

    def under(self, loader: Any) -> Any:
        """The host has made its train loader."""
        ...

    def before_update(self, batches: Iterator[dict], micro_batches: int) -> Iterator[dict]:
        """Called before the micro-batches of an optimizer step are taken; returns where to take them from."""
        ...

    def applied(self, rows: torch.Tensor, inputs: Any) -> AbstractContextManager[None]:
        """Around the loss of a batch, `inputs`, with these row ids."""
        ...

    def save_state(self, folder: str) -> None:
        """A checkpoint is written."""
        ...

    def load_state(self, folder: str) -> None:
        """The trainer resumes from a checkpoint."""
        ...


class Hooks:
    """What makes one trainer instance train with weights. The host's loss, sampler, optimizer and logging stay its own.

    | on the instance | why there |
    |---|---|
    | `train_dataset` | a column of row ids: the only thing that survives every sampler, packing and worker |
    | `data_collator` | hosts' collators do not know the column: ids are taken out before, and added back after |
    | `_set_signature_columns_if_needed` | lets the column through the host's filter |
    | `get_train_dataloader` | rows are drawn under the loader as accelerate made it (`places.py`); steps are counted by its length |
    | `get_batch_samples` | called once per optimizer step before its batches are taken: refreshes happen here |
    | `compute_loss` | the one place that every trainer of every host passes with its batch |
    | `_save_rng_state`, `_load_optimizer_and_scheduler` | checkpoints, see `_checkpoints` |
    | `train` | only after `remove`: a second call puts the hooks on again |

    Args:
        trainer: the host's, before `train()`.
        row_ids: one per row of its dataset, see `data.row_ids.row_ids_of`.
        stored: the rows that the ids count, by whose tokens they are found in a batch.
        run: what is called.
    """

    def __init__(self, trainer: Trainer, row_ids: list[Any], stored: Rows, run: Run):
        self._trainer, self._row_ids, self._stored, self._run = trainer, row_ids, stored, run
        self._rows = trainer.train_dataset
        self._on = False  # what somebody else hooked on after us may still call ours when it is off
        self._before: dict[str, tuple[Any, Any]] = {}  # attribute → what stood on the instance, what we put there
        self._install()

    def remove(self) -> None:
        """Take everything off, so that the trainer is the host's own again; another `train()` puts it on again."""
        self._take_off()
        host_train = self._trainer.train

        @functools.wraps(host_train)
        def train(*args: Any, **kwargs: Any) -> Any:
            self._take_off()
            self._install()
            return self._trainer.train(*args, **kwargs)

        self._put("train", train)

    def detach(self) -> None:
        """`remove`, for good: another `train()` trains without weights."""
        self._take_off()

    def _install(self) -> None:
        trainer = self._trainer
        if trainer.train_dataset is not self._rows:
            raise ICAError(
                "`trainer.train_dataset` was replaced after ica_plugin was attached, and weights belong to the rows that were there. "
                "Attach to a new trainer."
            )
        self._put("train_dataset", self._rows.add_column(ROW_IDS, self._row_ids))
        self._put("data_collator", RowIdCollator(trainer.data_collator, self._stored))
        for name, make in (
            ("_set_signature_columns_if_needed", self._columns),
            ("get_train_dataloader", self._loader),
            ("get_batch_samples", self._batches),
            ("compute_loss", self._loss),
            ("_save_rng_state", self._save),
            ("_load_optimizer_and_scheduler", self._load),
        ):
            host = getattr(trainer, name)
            self._put(name, functools.wraps(host)(make(host)))
        self._on = True

    def _put(self, name: str, value: Any) -> None:
        self._before[name] = vars(self._trainer).get(name, NOT_THERE), value
        setattr(self._trainer, name, value)

    def _take_off(self) -> None:
        self._on = False
        for name, (before, ours) in reversed(self._before.items()):
            if vars(self._trainer).get(name) is not ours:
                continue  # somebody hooked on after us; ours is passed through from now on
            if before is NOT_THERE:
                delattr(self._trainer, name)
            else:
                setattr(self._trainer, name, before)
        self._before = {}

    def _columns(self, host: Callable[[], None]) -> Callable[[], None]:
        def with_row_ids() -> None:
            host()
            if self._on and ROW_IDS not in self._trainer._signature_columns:
                self._trainer._signature_columns = [*self._trainer._signature_columns, ROW_IDS]

        return with_row_ids

    def _loss(self, host: Callable[..., Any]) -> Callable[..., Any]:
        def weighted_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            rows = inputs.pop(ROW_IDS, None)
            if not self._on or not (model.training and torch.is_grad_enabled()):
                return host(model, inputs, *args, **kwargs)
            if rows is None:
                raise ICAError(
                    "a training batch came without row ids, so it would train unweighted. The host replaced the train dataset "
                    "or the collator after ica_plugin was attached; please report the host and its version."
                )
            # Weights are looked up here, in the main process, so that a refresh reaches batches that workers have built already.
            with self._run.applied(rows, inputs):
                return host(model, inputs, *args, **kwargs)

        return weighted_loss

    def _loader(self, host: Callable[..., Any]) -> Callable[..., Any]:
        # Not `_get_train_sampler`: accelerate recognises a RandomSampler by its class when it prepares the loader.
        def loader_with_places(*args: Any, **kwargs: Any) -> Any:
            loader = host(*args, **kwargs)
            return self._run.under(loader) if self._on else loader

        return loader_with_places

    def _batches(self, host: Callable[..., Any]) -> Callable[..., Any]:
        def scored_batches(epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
            if self._on:
                epoch_iterator = self._run.before_update(epoch_iterator, num_batches)
            return host(epoch_iterator, num_batches, *args, **kwargs)

        return scored_batches

    def _save(self, host: Callable[..., Any]) -> Callable[..., Any]:
        # `on_save` comes when a checkpoint is complete for the host: a run killed just before it would resume without our state.
        # The random states are saved before the checkpoint is complete, and only where it can be resumed from.
        def save(output_dir: str, *args: Any, **kwargs: Any) -> Any:
            if self._on:
                self._run.save_state(output_dir)
            return host(output_dir, *args, **kwargs)

        return save

    def _load(self, host: Callable[..., Any]) -> Callable[..., Any]:
        def load(checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
            if self._on and checkpoint is not None:
                self._run.load_state(checkpoint)
            return host(checkpoint, *args, **kwargs)

        return load
