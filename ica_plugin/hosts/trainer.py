"""Attach to a trainer: row ids, weights, and the callback. Every host ends here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset, load_dataset, load_from_disk
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from ..callback import ICACallback, model_context
from ..config import ICAConfig, parse_config
from ..errors import ICAError
from ..examples import Example, read_examples, scored_tokens
from ..holdout import check_holdout, joined, json_error
from ..injection import trains_output_embedding
from ..log import get_logger
from ..row_ids import NO_ROW, ROW_IDS, RowIdCollator, row_ids_of
from ..versions import warn_if_untested
from ..weights_file import check_weights, read_weights

# Losses whose value for one row depends on the other rows of the batch or on a running mean over batches.
COUPLED_LOSSES = {"aot", "aot_pair", "aot_unpaired", "bco", "bco_pair"}
LENGTH_NORMALIZED_LOSSES = {"simpo", "orpo", "sigmoid_norm"}
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
SHARDED = (
    "is not supported yet: its ranks must run the same forwards together, which scoring does not. Take it out of the config; one "
    "process and DDP work."
)


def attach(
    trainer: Trainer, config: ICAConfig | Mapping[str, Any] | None = None, *, holdout: Any = None, weights: Any = None
) -> ICACallback:
    """Make a transformers or TRL trainer train with weights; call it between building the trainer and `train()`.

        trainer = SFTTrainer(model, train_dataset=dataset, args=args)
        ica_plugin.attach(trainer, {"k": 3}, holdout="holdout.jsonl")
        trainer.train()

    Args:
        trainer: transformers.Trainer, or TRL's SFTTrainer, DPOTrainer, CPOTrainer, ORPOTrainer or KTOTrainer.
        config: the keys of the `ica:` block.
        holdout: the good examples: a path, a hub id, the arguments of `datasets.load_dataset`, a list of named sets as under
            `ica.holdout`, or a `datasets.Dataset`, either raw (it is prepared as the trainer prepared its own rows) or tokenised,
            in the columns of `trainer.train_dataset`.
        weights: float [n], one weight per row of `trainer.train_dataset`, or a file or column as under `ica.weights`;
            then nothing is scored and no holdout is needed.

    Returns:
        the callback, which holds the scores' files and the weights.

    Raises:
        ICAError: what cannot be weighted exactly, a wrong key, or a holdout or weights that do not fit the trainer.
    """
    if any(base.__module__.startswith("trl.") for base in type(trainer).__mro__):
        warn_if_untested("trl")
    block = config.model_dump(exclude_unset=True) if isinstance(config, ICAConfig) else dict(config or {})
    for key, value in (("holdout", holdout), ("weights", weights)):
        if value is None:
            continue
        if block.get(key) is not None:
            raise ICAError(f"{key} is given twice, in the config and as an argument; give it once.")
        # The array or dataset itself does not go into run.json.
        if isinstance(value, (str, Path)):
            block[key] = str(value)
        elif key == "holdout" and isinstance(value, (Mapping, list)):
            block[key] = value
        else:
            block[key] = f"{type(value).__name__} of {len(value)} rows"
    given = None
    if weights is not None and not isinstance(weights, (str, Path)):
        given = weights.detach().float().cpu().numpy() if torch.is_tensor(weights) else weights
    parsed = parse_config(block)
    _refuse_trl_settings(trainer)
    rows = holdout if hasattr(holdout, "column_names") else None
    return attach_examples(
        trainer,
        parsed,
        read_holdout=lambda one: _read_holdout(trainer, one.holdout if rows is None else rows, str(one.holdout)),
        weights=given,
    )


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


def _read_holdout(trainer: Trainer, source: Any, name: str) -> tuple[str, list[Example]]:
    rows = source if hasattr(source, "column_names") else _load_rows(source, name)
    if len(rows) == 0:
        raise ICAError(f"ica.holdout: {name} has no rows. Give at least one good example; 50 to 500 serve well.")
    tokenised = [column for column in trainer.train_dataset.column_names if column.endswith("_ids")]
    if not set(tokenised) & set(rows.column_names):
        try:
            rows = prepare_like_train(trainer, rows)
        except ICAError:
            raise
        except Exception as error:
            raise ICAError(
                f"ica.holdout: {name}: its rows (columns {rows.column_names}) could not be prepared as the trainer's own were: "
                f"{type(error).__name__}: {error}. Give rows with the fields of the training data, or tokenised rows with the "
                f"columns {tokenised}."
            ) from error
    return name, read_examples(rows, trainer.data_collator)


def _load_rows(source: str | Mapping[str, Any], name: str) -> Dataset:
    """A path, a hub id, or a mapping of the arguments of `datasets.load_dataset`, as rows."""
    entry = {"path": source} if isinstance(source, str) else dict(source)
    path = Path(str(entry.get("path", "")))
    kind = FILE_TYPES.get(path.suffix.lower())
    if (kind or str(path).startswith((".", "/", "~"))) and not path.expanduser().exists():
        raise ICAError(f"ica.holdout: {name}: no such file or folder (looked for {path.expanduser().absolute()}).")
    try:
        if (path / "state.json").is_file():
            return load_from_disk(str(path))
        if kind:
            entry |= {"path": kind, "data_files": str(path.expanduser())}
        return load_dataset(**{"split": "train", **entry})
    except Exception as error:
        malformed = json_error(path)
        if malformed:
            raise ICAError(f"ica.holdout: malformed json: {malformed}. Correct or remove that line.") from error
        raise ICAError(f"ica.holdout: {name}: cannot be read by `datasets`: {type(error).__name__}: {error}") from error


def attach_examples(
    trainer: Trainer,
    config: ICAConfig,
    *,
    read_holdout: Callable[[ICAConfig], tuple[str, list[Example]]],
    weights: Any = None,
    moved_rows: str = "",
) -> ICACallback:
    """Make a trainer train with weights: what all hosts share.

    Adds an integer column to `trainer.train_dataset`, wraps the collator, `compute_loss`, `get_batch_samples` and the two methods
    that write and read checkpoints on the instance, and adds a callback. The host's loss, sampler, optimizer and logging stay its
    own.

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
    _refuse_what_cannot_be_weighted(trainer)
    train = read_examples(trainer.train_dataset, trainer.data_collator)
    unsupervised = [i for i, row in enumerate(train) if not row.can_be_scored]
    if len(unsupervised) == len(train):
        raise ICAError("no train row has a supervised token; check the dataset's `type` and label masks.")
    if unsupervised:
        get_logger().warning(
            "%d of %d train rows have no supervised token (first: row %d) and get weight 0.",
            len(unsupervised),
            len(train),
            unsupervised[0],
        )
    row_ids = row_ids_of(trainer.train_dataset)
    given = holdout = None
    if weights is not None or config.weights is not None:
        given = _given_weights(trainer, weights, config, row_ids, train, moved_rows)
    else:
        context = model_context(trainer.model)
        holdout = joined({name: check_holdout(*read_holdout(one), train, context) for name, one in config.sets.items()})
    callback = ICACallback(trainer, config, train, holdout, given=given, length_normalize=_length_normalize(trainer, config))
    callback.files.moved_rows = moved_rows
    _add_row_ids(trainer, row_ids)
    _wrap_loss(trainer, callback)
    _wrap_batches(trainer, callback)
    _wrap_checkpoints(trainer, callback)
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
    _refuse_other_models(trainer)
    coupled = loss_types(trainer) & COUPLED_LOSSES
    if coupled:
        raise ICAError(
            f"the loss `{sorted(coupled)[0]}` couples the rows of a batch, so no single row's gradient can be weighted. "
            "Use a loss that is a mean over rows: sigmoid, ipo, hinge, simpo, orpo, kto."
        )
    kind = trainer.accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ICAError(f"{kind.value} {SHARDED}")
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")) or any(
        isinstance(parameter, DTensor) for parameter in trainer.model.parameters()
    ):
        raise ICAError(f"tensor, context or sequence parallelism {SHARDED}")
    if trainer.args.n_gpu > 1:
        raise ICAError(
            f"one process would train on {trainer.args.n_gpu} GPUs (nn.DataParallel), whose replicas see parts of a batch. Start it with "
            "`torchrun` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )


def _refuse_other_models(trainer: Trainer) -> None:
    if getattr(trainer.model.config, "is_encoder_decoder", False):
        raise ICAError(f"{type(trainer.model).__name__} is an encoder-decoder; ica_plugin weights causal language models.")
    if getattr(trainer.data_collator, "mlm", False):
        raise ICAError("the collator masks tokens (`mlm=True`), and ica_plugin scores causal language models. Set `mlm=False`.")


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


def _given_weights(
    trainer: Trainer, weights: Any, config: ICAConfig, row_ids: list[Any], train: list[Example], moved_rows: str
) -> np.ndarray:
    """The weight of each example, float64 [examples]: the array `weights`, or what the block's `weights` names."""
    dataset, examples = trainer.train_dataset, len(train)
    if weights is None and config.weights not in dataset.column_names:
        if not Path(config.weights).suffix:
            raise ICAError(
                f"ica.weights: {config.weights}: the train dataset has no such column, only {dataset.column_names}. Give one "
                "of them, or a .parquet, .csv or .jsonl file with the columns row and weight."
            )
        return read_weights(config.weights, examples, tokens=scored_tokens(train), moved_rows=moved_rows)
    where = "weights" if weights is not None else f"ica.weights: column `{config.weights}`"
    given = check_weights(dataset[config.weights] if weights is None else weights, where)
    if given.shape == (len(dataset),) and np.ndim(row_ids[0]) == 1:
        # One weight per packed row is one for each of its examples.
        given = np.repeat(given, [len(np.unique([i for i in ids if i != NO_ROW])) for ids in row_ids])
    if given.shape != (examples,):
        raise ICAError(f"{where}: shape {given.shape}, but the trainer has {examples} train rows; give one weight per row.")
    return given


def _add_row_ids(trainer: Trainer, row_ids: list[Any]) -> None:
    trainer.train_dataset = trainer.train_dataset.add_column(ROW_IDS, row_ids)
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
