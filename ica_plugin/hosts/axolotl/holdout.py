"""The holdout through Axolotl's own loaders."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from axolotl.utils.data import prepare_datasets, prepare_preference_datasets
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from ...config import ICAConfig
from ...data.loaders import json_error
from ...data.read import read_examples
from ...data.store import Example
from ...errors import ICAError
from ..trl import prepare_like_train

# Keys of a dataset entry that say where its rows are; the others say how to read them.
LOCATION_KEYS = {"path", "name", "split", "data_files", "ds_type", "revision", "shards", "shards_idx", "preprocess_shards"}


LOCAL_ENDINGS = {".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt"}


def holdout_entry(cfg: DictDefault, holdout: str | dict[str, Any]) -> tuple[str, DictDefault]:
    """The holdout as an entry under `datasets`.

    A path or hub id is read as the run's first dataset is; so is an entry without a `type`.

    Returns:
        (name for messages, entry).

    Raises:
        ICAError: an entry without a path, or a local file that is not there.
    """
    given = {"path": holdout} if isinstance(holdout, str) else {k: v for k, v in holdout.items() if v is not None}
    if not given.get("path"):
        raise ICAError("ica.holdout: the dataset entry has no `path`.")
    path = Path(given["path"])
    local = path.suffix in LOCAL_ENDINGS or given["path"].startswith((".", "/", "~"))
    if local and not path.exists():
        raise ICAError(f"ica.holdout: {given['path']}: no such file or folder (looked for {path.absolute()}).")
    reading = {}
    if "type" not in given and cfg.datasets:
        reading = {k: v for k, v in dict(cfg.datasets[0]).items() if k not in LOCATION_KEYS}
    return given["path"], DictDefault({**reading, **given})


def load_holdout(cfg: DictDefault, config: ICAConfig, tokenizer: Any) -> tuple[str, Dataset]:
    """Read the holdout through Axolotl's own loaders and prompt strategies.

    Args:
        cfg: the run's validated config.
        config: the block.
        tokenizer: the run's.

    Returns:
        (name for messages, rows): tokenised for SFT; prompt, chosen, … as text for preference runs.

    Raises:
        ICAError: the holdout cannot be read as the run's data is.
    """
    source, entry = holdout_entry(cfg, config.holdout)
    with tempfile.TemporaryDirectory() as prepared:
        run = DictDefault(copy.deepcopy(dict(cfg)))
        run.update(
            datasets=[entry],
            test_datasets=None,
            val_set_size=0,
            sample_packing=False,
            shuffle_merged_datasets=False,
            dataset_exact_deduplication=False,
            excess_length_strategy="raise",
            dataset_prepared_path=prepared,
            push_dataset_to_hub=None,
            skip_prepare_dataset=False,
            # A step count for the holdout means nothing, but the loaders compute one.
            max_steps=None,
        )
        try:
            if cfg.rl:
                rows, _ = prepare_preference_datasets(run, tokenizer)
            else:
                rows, *_ = prepare_datasets(run, tokenizer)
        except Exception as error:
            malformed = json_error(source)
            if malformed:
                raise ICAError(f"ica.holdout: malformed json: {malformed}. Correct or remove that line.") from error
            raise ICAError(f"ica.holdout: {source}: {_explain(error, cfg)}") from error
    if len(rows) == 0:
        raise ICAError(
            f"ica.holdout: {source} has no rows with a supervised token under `type: {entry.type}`. Give at least one good "
            "example; 50 to 500 serve well."
        )
    return source, rows


def _explain(error: Exception, cfg: DictDefault) -> str:
    text = f"{type(error).__name__}: {error}"
    causes = [text]
    while (error := error.__cause__ or error.__context__) is not None:
        causes.append(f"{type(error).__name__}: {error}")
    everything = " | ".join(dict.fromkeys(causes))
    lowered = everything.lower()
    if "sequence_len" in lowered or "longer than" in lowered or "exceeds" in lowered:
        return f"a row is longer than the run's context (sequence_len: {cfg.sequence_len}). Shorten or remove it. ({everything})"
    if cfg.rl and any(word in lowered for word in ("chosen", "rejected", "completion", "label")):
        return (
            f"a {cfg.rl} run needs holdout rows with the same fields as its training data "
            f"({'prompt, completion and label' if cfg.rl == 'kto' else 'a prompt, `chosen` and `rejected`'}). ({everything})"
        )
    return (
        "it could not be read the way the run's first dataset is. Give it the same format, or a full dataset entry with its "
        f"own `type`. ({everything})"
    )


def _read_holdout(cfg: DictDefault, config: ICAConfig, trainer: Any) -> tuple[str, list[Example]]:
    source, rows = load_holdout(cfg, config, trainer.processing_class)
    if cfg.rl:
        rows = prepare_like_train(trainer, rows)
    return source, read_examples(rows, trainer.data_collator)
