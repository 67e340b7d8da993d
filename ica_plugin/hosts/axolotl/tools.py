"""What `ica-plugin` asks of Axolotl: validate a config, and the trainer it builds."""

from __future__ import annotations

import copy
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.loaders import load_tokenizer
from axolotl.train import setup_model_and_trainer
from axolotl.utils.dict import DictDefault
from pydantic import ValidationError
from transformers import AutoConfig

from ...config import ICAConfig, parse_config
from ...data.read import token_columns
from ...data.summary import summary
from ...errors import ICAError
from ...run.callback import ICACallback
from ...versions import warn_if_untested
from .args import DATASET_MOVES, config_of, kind_of, moved_rows, refuse_unsupported
from .holdout import AxolotlHoldout


def validate(path: Path) -> dict[str, Any]:
    """Check a config, its train rows and its holdout without loading the model.

    Returns:
        what was found, by name.

    Raises:
        ICAError: what is wrong.
    """
    warn_if_untested("axolotl")
    with tempfile.TemporaryDirectory() as folder:  # nothing stays on the disk
        cfg = _loaded(path, folder)
        refuse_unsupported(cfg)
        cfg.dataset_prepared_path, cfg.push_dataset_to_hub = folder, None
        return _checked(cfg, config_of(cfg), load_tokenizer(cfg))


def _loaded(path: Path, output_dir: str) -> DictDefault:
    """The validated config with another output folder: Axolotl begins its log there, in place of one that a run left.

    Raises:
        ICAError: what Axolotl or the block refuse.
    """
    try:
        return load_cfg(str(path), output_dir=output_dir)
    except ValidationError as error:
        raise ICAError(str(error)) from None


def _checked(cfg: DictDefault, config: ICAConfig, tokenizer: Any) -> dict[str, Any]:
    """What `validate` finds in the data."""
    train = (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg).train_dataset
    load = AxolotlHoldout(cfg, tokenizer)
    if cfg.rl:  # preference rows are tokenised by the trainer, which needs the model
        return summary(config, train, load, kind=kind_of(cfg), moved_rows=moved_rows(cfg))
    model = AutoConfig.from_pretrained(
        cfg.base_model, revision=cfg.revision_of_model or "main", trust_remote_code=bool(cfg.trust_remote_code)
    ).get_text_config()
    context = getattr(model, "max_position_embeddings", None)
    # Rows with images are tokenised by the collator, which needs the trainer.
    kind = None if token_columns(train.column_names) else kind_of(cfg)
    return summary(config, train, load, kind=kind, context=context, moved_rows=moved_rows(cfg))


def attached(path: Path, changes: dict[str, Any]) -> tuple[ICACallback, tuple[np.ndarray, int] | None]:
    """The trainer that `axolotl train` would build, with the plugin attached, and nothing trained.

    Args:
        path: the config.
        changes: keys of the `ica:` block that replace the config's.

    Returns:
        the callback, and for each train row its place in the data as it lies in the file (−1 where that is unknown) with the
        number of rows there; None where the trainer's rows are not those that were loaded.

    Raises:
        ICAError: what is wrong with the config.
    """
    warn_if_untested("axolotl")
    with tempfile.TemporaryDirectory() as folder:
        cfg = _loaded(path, folder)
        cfg.ica = parse_config({**config_of(cfg).model_dump(exclude_unset=True), "weights": None, **changes}).model_dump(
            exclude_unset=True
        )
        data = (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg)
        trainer, *_ = setup_model_and_trainer(cfg, data)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ICACallback))
    if len(data.train_dataset) != len(callback.train):
        return callback, None
    return callback, _places_in_file(cfg, data.train_dataset)


def _places_in_file(cfg: DictDefault, train: Any) -> tuple[np.ndarray, int]:
    """For each train row its place in the data as it lies in the file, −1 where that is unknown; and the number of rows there."""
    with tempfile.TemporaryDirectory() as prepared:
        run = DictDefault(copy.deepcopy(dict(cfg)))
        # As it lies in the file: neither shuffled nor thinned.
        run.update(
            datasets=[DictDefault({**entry, **DATASET_MOVES}) for entry in run.datasets],
            dataset_shard_num=None,
            shuffle_merged_datasets=False,
            shuffle_before_merging_datasets=False,
            dataset_exact_deduplication=False,
            test_datasets=None,
            val_set_size=0,
            excess_length_strategy="truncate",
            dataset_prepared_path=prepared,
            push_dataset_to_hub=None,
        )
        in_file = [_content(row) for row in (load_preference_datasets if cfg.rl else load_datasets)(cfg=run).train_dataset]
    places: dict[str, deque[int]] = {}
    for place, content in enumerate(in_file):
        places.setdefault(content, deque()).append(place)
    source = [places[content].popleft() if places.get(content := _content(row)) else -1 for row in train]
    return np.array(source), len(in_file)


def _content(row: dict[str, Any]) -> str:
    return repr(sorted((key, value) for key, value in row.items() if value is not None))
