"""Attach to any `transformers.Trainer`: the holdout through `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset, load_from_disk
from transformers import Trainer

from ..config import ICAConfig, parse_config
from ..data.loaders import json_error
from ..data.read import read_examples
from ..data.store import Example
from ..errors import ICAError
from ..run.attach import attach_examples
from ..run.callback import ICACallback
from ..versions import warn_if_untested
from .trl import _refuse_trl_settings, prepare_like_train

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}


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
