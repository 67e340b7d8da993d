"""TRL: raw rows prepared as its trainers prepare their own, and its settings that cannot be weighted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from ..errors import ICAError
from ..training.injection import trains_output_embedding
from ..training.refusals import loss_types

# Settings by which TRL's trainers, their arguments and their collators cut rows.
LIMITS = ("max_length", "max_prompt_length", "max_completion_length")

NO_LIMIT = 1 << 30


def is_trl(trainer: Trainer) -> bool:
    """Whether the trainer is one of TRL's, or made from one."""
    return any(base.__module__.startswith("trl.") for base in type(trainer).__mro__)


def limit_of(trainer: Trainer) -> tuple[str, int] | None:
    """The setting by which a TRL trainer cuts its rows, with its value in tokens; None where it cuts none."""
    if not is_trl(trainer):
        return None
    for holder in (trainer, trainer.args):  # TRL 0.x resolves a default on the trainer
        if isinstance(getattr(holder, "max_length", None), int):
            return "max_length", holder.max_length
    return None


@contextmanager
def nothing_cut(trainer: Trainer) -> Iterator[None]:
    """Inside the block a TRL trainer's own preparation and collator cut no row, so that a long holdout row is seen as it is.

    Of other collators `max_length` may be what they pad to, so it is left alone.
    """
    holders = [trainer, trainer.args] if is_trl(trainer) else []
    if holders and type(trainer.data_collator).__module__.startswith("trl."):
        holders.append(trainer.data_collator)
    kept = []
    for holder in holders:
        for name in LIMITS:
            if isinstance(value := getattr(holder, name, None), int):
                kept.append((holder, name, value))
                setattr(holder, name, NO_LIMIT)
    try:
        yield
    finally:
        for holder, name, value in kept:
            setattr(holder, name, value)


def refuse_trl_settings(trainer: Trainer) -> None:
    """Raise ICAError for settings of a TRL trainer under which rows cannot be weighted one by one."""
    if "chunked_nll" in loss_types(trainer) and trains_output_embedding(trainer.model):
        raise ICAError(
            "TRL's `loss_type='chunked_nll'` (its default) never computes logits, so a trained output embedding cannot be "
            "weighted. Set `loss_type='nll'` in the SFTConfig, which is the same loss, or train with LoRA."
        )
    if getattr(trainer.args, "packing", False) and "seq_lengths" not in trainer.train_dataset.column_names:
        raise ICAError(
            f"`packing_strategy={trainer.args.packing_strategy!r}` cuts rows and forgets where they began, so they cannot be "
            "weighted one by one. Use `packing_strategy='bfd'`."
        )


def moved_rows(trainer: Trainer) -> str:
    """Why a TRL trainer's rows do not stand as in the data it was given, and without which settings they do; "" where they do."""
    if getattr(trainer.args, "packing", False):
        return "`packing=True` puts them into packs by their lengths (not with `padding_free=True` in its place, which pads no row either)"
    if getattr(trainer.args, "shuffle_dataset", False):
        return "`shuffle_dataset=True` shuffles them (not with `shuffle_dataset=False`)"
    return ""


def prepare_like_train(trainer: Trainer, rows: Any) -> Any:
    """Tokenise raw rows (prompt, chosen, …) as the TRL trainer tokenised its own.

    Args:
        trainer: a TRL trainer.
        rows: `datasets.Dataset` in the columns that the trainer was given.

    Returns:
        the rows in the columns of `trainer.train_dataset`, never packed.

    Raises:
        ICAError: the trainer offers no way to prepare rows.
    """
    if hasattr(trainer, "_prepare_dataset"):
        arguments = {
            "dataset": rows,
            "processing_class": trainer.processing_class,
            "args": trainer.args,
            "dataset_name": "holdout",
        }
        if "packing" in inspect.signature(trainer._prepare_dataset).parameters:  # SFT
            arguments |= {"packing": False, "formatting_func": getattr(trainer, "_formatting_func", None)}
        return trainer._prepare_dataset(**arguments)
    if hasattr(trainer, "tokenize_row"):  # CPO, ORPO
        return _apply_chat_template(trainer, rows).map(trainer.tokenize_row)
    if type(trainer).__name__ == "KTOTrainer":  # TRL 0.x tokenises in its constructor
        from trl.data_utils import maybe_unpair_preference_dataset
        from trl.trainer import kto_trainer

        limits = (
            "is_encoder_decoder",
            "max_length",
            "truncation_mode",
            "label_pad_token_id",
            "max_prompt_length",
            "max_completion_length",
        )
        rows = _apply_chat_template(trainer, rows, unpair=maybe_unpair_preference_dataset)
        rows = rows.map(kto_trainer._tokenize, batched=True, fn_kwargs={"tokenizer": trainer.processing_class})
        settings = {name: getattr(trainer, name) for name in limits}
        return rows.map(kto_trainer._process_tokens, fn_kwargs={"prefix": "", "tokenizer": trainer.processing_class, **settings})
    raise ICAError(
        f"{type(trainer).__name__} offers no way to prepare raw rows; give the holdout tokenised, in the columns of its train "
        f"dataset: {trainer.train_dataset.column_names}."
    )


def _apply_chat_template(trainer: Trainer, rows: Any, unpair: Callable[[Any], Any] = lambda rows: rows) -> Any:
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

    rows = unpair(rows.map(maybe_extract_prompt))
    return rows.map(lambda row: maybe_apply_chat_template(row, trainer.processing_class))
