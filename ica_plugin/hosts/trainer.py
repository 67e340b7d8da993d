"""Attach to any `transformers.Trainer`: the holdout through `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset, load_from_disk
from transformers import Trainer

from ..config import ICAConfig, parse_config
from ..data.loaders import HoldoutLoader, Source, expanded, local_path
from ..data.read import token_columns
from ..data.store import Rows
from ..errors import ICAError
from ..run.attach import attach_examples
from ..run.callback import ICACallback
from ..versions import warn_if_untested
from .given import refuse_iterator, sets_in_memory
from .trl import is_trl, limit_of, moved_rows, nothing_cut, prepare_like_train, refuse_trl_settings

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
            `ica.holdout`; or rows: a `datasets.Dataset`, a pandas DataFrame or a list of dicts, either raw (then prepared as the
            trainer prepared its own rows) or tokenised, in the columns of `trainer.train_dataset`; or a DatasetDict, whose split
            `train` counts, or else each split as a set by its name.
        weights: float [n], one weight per row of `trainer.train_dataset`, or a file or column as under `ica.weights`;
            then nothing is scored and no holdout is needed. Where TRL moves rows (`packing`, `shuffle_dataset`) an array or a
            file made by hand is refused.

    Returns:
        the callback, which holds the scores' files and the weights.

    Raises:
        ICAError: what cannot be weighted exactly, a wrong key, or a holdout or weights that do not fit the trainer.
    """
    if is_trl(trainer):
        warn_if_untested("trl")
    block = config.model_dump(exclude_unset=True) if isinstance(config, ICAConfig) else dict(config or {})
    for key, value in (("holdout", holdout), ("weights", weights)):
        if value is not None and block.get(key) is not None:
            raise ICAError(f"{key} is given twice, in the config and as an argument; give it once.")
    sets = None if holdout is None else sets_in_memory(holdout)
    # The array or dataset itself does not go into run.json.
    if sets is not None:
        names = {
            name: f"{type(holdout).__name__} of {len(rows)} rows" + (f": {name}" if name else "") for name, rows in sets.items()
        }
        block["holdout"] = names[""] if list(names) == [""] else [{"name": name, "path": path} for name, path in names.items()]
        sets = {names[name]: rows for name, rows in sets.items()}
    elif holdout is not None:
        block["holdout"] = str(holdout) if isinstance(holdout, Path) else holdout
    if isinstance(weights, (str, Path)):
        block["weights"] = str(weights)
    elif weights is not None:
        refuse_iterator(weights, "weights")
        block["weights"] = f"{type(weights).__name__} of {len(weights)} rows"
    given = None
    if weights is not None and not isinstance(weights, (str, Path)):
        given = weights.detach().float().cpu().numpy() if torch.is_tensor(weights) else weights
    parsed = parse_config(block)
    if is_trl(trainer):
        refuse_trl_settings(trainer)
    moved = moved_rows(trainer) if is_trl(trainer) else ""
    return attach_examples(trainer, parsed, read_holdout=TrainerHoldout(trainer, sets), weights=given, moved_rows=moved)


class TrainerHoldout(HoldoutLoader):
    """The holdout through `datasets`, prepared as the trainer prepared its own rows unless it is tokenised.

    Args:
        trainer: any transformers or TRL trainer.
        sets: rows that are there already, by what the block's `holdout` calls each set.
    """

    def __init__(self, trainer: Trainer, sets: Mapping[str, Dataset] | None = None):
        self.trainer, self.sets = trainer, sets
        self.collator, self.limit = trainer.data_collator, limit_of(trainer)

    def __call__(self, config: ICAConfig) -> tuple[str, Rows]:
        with nothing_cut(self.trainer):
            return super().__call__(config)

    def find(self, holdout: str | Mapping[str, Any]) -> Source:
        """The arguments of `datasets.load_dataset`; those of a file name the reader of its format."""
        if self.sets is not None:
            return Source(str(holdout), None)
        entry = {"path": holdout} if isinstance(holdout, str) else dict(holdout)
        if not entry.get("path"):
            raise ICAError("ica.holdout: the dataset entry has no `path`.")
        name = str(entry["path"])
        file = local_path(name)
        entry |= {key: expanded(entry[key]) for key in ("path", "data_files", "data_dir") if key in entry}
        if file is not None and file.suffix.lower() in FILE_TYPES:
            entry |= {"path": FILE_TYPES[file.suffix.lower()], "data_files": str(file)}
        return Source(name, entry, file)

    def read(self, source: Source) -> Dataset:
        if self.sets is not None:
            return self.sets[source.name]
        if source.file is not None and (source.file / "state.json").is_file():
            return load_from_disk(str(source.file))
        return load_dataset(**{"split": "train", **source.entry})

    def explain(self, error: Exception, source: Source) -> str:
        return f"cannot be read by `datasets`: {type(error).__name__}: {error}"

    def prepare(self, name: str, dataset: Dataset) -> Any:
        rows, layout = self._prepared(name, dataset), self.trainer.train_dataset.format
        # A collator of tensors gets tensors, one of lists gets lists. Another format (TRL 0.24's transform) is its preparation's own.
        return rows if layout["type"] == "custom" else rows.with_format(layout["type"], **layout["format_kwargs"])

    def _prepared(self, name: str, dataset: Dataset) -> Any:
        tokenised = token_columns(self.trainer.train_dataset.column_names)
        # The collator makes tokens of rows that have none (text, images).
        if not tokenised or set(tokenised) & set(dataset.column_names):
            return dataset
        try:
            return prepare_like_train(self.trainer, dataset)
        except ICAError:
            raise
        except Exception as error:  # whatever a trainer's own preparation raises
            raise ICAError(
                f"ica.holdout: {name}: its rows (columns {dataset.column_names}) could not be prepared as the trainer's own were: "
                f"{type(error).__name__}: {error}. Give rows with the fields of the training data, or tokenised rows with the "
                f"columns {tokenised}."
            ) from error
