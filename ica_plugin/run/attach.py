"""Attach to a trainer: row ids, weights, and the callback. Every host ends here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer

from ..config import BUILTIN_RETRIEVAL, ICAConfig
from ..data.holdout import Holdout, check_holdout, joined
from ..data.read import read_examples
from ..data.row_ids import NO_ROW, digest_of_ids, row_ids_of
from ..data.store import Rows
from ..data.weights_file import check_weights, read_weights
from ..errors import ICAError
from ..expression import parse_score, parts_of
from ..log import get_logger
from ..policy.model import model_context
from ..policy.reference import reference_of
from ..scorers import require
from ..training.injection import trains_output_embedding
from ..training.refusals import refuse_what_cannot_be_weighted
from ..training.wrap import Hooks
from .callback import ICACallback
from .fingerprint import facts_of


def attach_examples(
    trainer: Trainer,
    config: ICAConfig,
    *,
    read_holdout: Callable[[ICAConfig], tuple[str, Rows]],
    weights: Any = None,
    moved_rows: str = "",
) -> ICACallback:
    """Make a trainer train with weights: what all hosts share.

    Puts `training.wrap.Hooks` on the instance and adds a callback. The host's loss, sampler, optimizer and logging stay its own.

    Args:
        trainer: before `train()`.
        config: the block.
        read_holdout: takes the block for one holdout set, and returns the set's name for messages and its rows. Not called
            with given weights.
        weights: float [n], a weight per row of `trainer.train_dataset`, instead of the block's `weights`.
        moved_rows: why the trainer's rows do not stand as in the data file, if they do not.

    Raises:
        ICAError: what cannot be weighted exactly, and what to do about it.
    """
    refuse_what_cannot_be_weighted(trainer)
    row_ids = row_ids_of(trainer.train_dataset)
    train = read_examples(trainer.train_dataset, trainer.data_collator)
    unsupervised = np.flatnonzero(~train.can_be_scored)
    if len(unsupervised) == len(train):
        raise ICAError("no train row has a supervised token; check the dataset's `type` and label masks.")
    if len(unsupervised):
        get_logger().warning(
            "%d of %d train rows have no supervised token (first: row %d) and get weight 0.",
            len(unsupervised),
            len(train),
            unsupervised[0],
        )
    config = _resolved(trainer, config, train, row_ids)
    given, holdout = None, Holdout([], [], [])
    if weights is not None or config.weights is not None:
        given = _given_weights(trainer, weights, config, row_ids, train, moved_rows)
    else:
        # Before the holdout is read and anything is scored.
        if config.needs_demonstrations and config.retrieval not in BUILTIN_RETRIEVAL and trainer.processing_class is None:
            raise ICAError(
                f"ica.retrieval: {config.retrieval!r} compares texts, and the trainer has no tokenizer to read its rows with. Build it "
                f"with `processing_class=tokenizer`, or take one of {', '.join(BUILTIN_RETRIEVAL)}, which need none."
            )
        require(parts_of(parse_score(config.score)), trainer.model, train.kind, reference_of(trainer))
        context = model_context(trainer.model)
        holdout = joined({name: check_holdout(*read_holdout(one), train, context) for name, one in config.sets.items()})
    callback = ICACallback(trainer, config, train, holdout, given=given, length_normalize=bool(config.length_normalize))
    callback.ranks.agree(facts_of(config, train, holdout, given) | {"row ids": digest_of_ids(row_ids)})
    callback.files.moved_rows, callback.files.train_rows = moved_rows, train.digest
    callback.hooks = Hooks(trainer, row_ids, train, callback)
    trainer.add_callback(callback)
    return callback


def _resolved(trainer: Trainer, config: ICAConfig, train: Rows, row_ids: list[Any]) -> ICAConfig:
    """The block without `auto`; the log says what was chosen where rows cannot be drawn.

    Raises:
        ICAError: `apply: sample`, and rows that cannot be drawn.
    """
    why = ""
    if np.ndim(row_ids[0]) == 1:
        why = "the rows were packed before the trainer was built, so no single row can be drawn"
    elif trainer.accelerator.dispatch_batches:
        why = "one process fetches the batches of all (`dispatch_batches: true`), so rows cannot be drawn on every rank alike"
    if why and (config.apply == "sample" or config.epoch_share < 1):
        raise ICAError(
            f"ica.apply: sample: {why}. Switch that off (Axolotl's `sample_packing` can stay: it packs what is drawn), or set "
            "`apply: gradient`."
        )
    # A fused loss that computes no logits would pass by token weights where the output embedding is trained.
    trained = trains_output_embedding(trainer.model)
    resolved = config.resolved(train.kind, draws=not why, drops=not trained)
    if trained and resolved.drop_tokens is None and config.resolved(train.kind, draws=not why).drop_tokens is not None:
        get_logger().info(
            "drop_tokens: null, since the output embedding is trained. `drop_tokens: auto` asks for it; not with a fused loss."
        )
    if why and config.apply == "auto":
        get_logger().info("apply: gradient, since %s: each is trained once, and its gradient scaled.", why)
    return resolved


def _given_weights(
    trainer: Trainer, weights: Any, config: ICAConfig, row_ids: list[Any], train: Rows, moved_rows: str
) -> np.ndarray:
    """The weight of each example, float64 [examples]: the array `weights`, or what the block's `weights` names."""
    dataset, examples = trainer.train_dataset, len(train)
    if weights is None and config.weights is not None and config.weights not in dataset.column_names:
        if not Path(config.weights).suffix:
            raise ICAError(
                f"ica.weights: {config.weights}: the train dataset has no such column, only {dataset.column_names}. Give one "
                "of them, or a .parquet, .csv or .jsonl file with the columns row and weight."
                + (f" The trainer may have dropped it: {moved_rows}." if moved_rows else "")
            )
        return read_weights(config.weights, examples, train=train, moved_rows=moved_rows)
    where = "weights" if weights is not None else f"ica.weights: column `{config.weights}`"
    if weights is not None and moved_rows:
        raise ICAError(
            f"{where}: an array counts the trainer's rows, and they do not stand as in the data: {moved_rows}. Or put the weights into "
            "the data, as a column that goes where its row goes: `attach(trainer, weights=<its name>)`."
        )
    given = check_weights(dataset[config.weights] if weights is None else weights, where)
    if given.shape == (len(dataset),) and np.ndim(row_ids[0]) == 1:
        # One weight per packed row is one for each of its examples.
        given = np.repeat(given, [len(np.unique([i for i in ids if i != NO_ROW])) for ids in row_ids])
    if given.shape != (examples,):
        raise ICAError(
            f"{where}: shape {given.shape}, but the trainer has {examples} train rows; give one weight per row. Where the trainer drops "
            "rows, put the weights into the data as a column, which goes where its row goes, and give its name."
        )
    return given
