"""TRL: raw rows prepared as its trainers prepare their own, and its settings that cannot be weighted."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from ..errors import ICAError
from ..training.injection import trains_output_embedding
from ..training.refusals import loss_types


def _refuse_trl_settings(trainer: Trainer) -> None:
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
