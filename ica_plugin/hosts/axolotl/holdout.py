"""The holdout through Axolotl's own loaders."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from axolotl.utils.data import prepare_datasets, prepare_preference_datasets
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from ...config import ICAConfig
from ...data.loaders import HoldoutLoader, Source, expanded, local_path
from ...data.store import Rows
from ...errors import ICAError
from ..trl import limit_of, nothing_cut, prepare_like_train

# Keys of a dataset entry that say where its rows are; the others say how to read them.
LOCATION_KEYS = {"path", "name", "split", "data_files", "ds_type", "revision", "shards", "shards_idx", "preprocess_shards"}


class AxolotlHoldout(HoldoutLoader):
    """The holdout through Axolotl's own loaders and prompt strategies.

    Args:
        cfg: the run's validated config.
        tokenizer: the run's.
        trainer: that was built for the run; preference rows are tokenised by it, and none are without.
    """

    def __init__(self, cfg: DictDefault, tokenizer: Any, trainer: Any = None):
        self.cfg, self.tokenizer, self.trainer = cfg, tokenizer, trainer
        if trainer is not None:
            self.collator = trainer.data_collator
            self.limit = limit_of(trainer) if cfg.rl else None

    def __call__(self, config: ICAConfig) -> tuple[str, Rows]:
        with nothing_cut(self.trainer) if self.cfg.rl else nullcontext():  # Axolotl's preference trainers are TRL's
            return super().__call__(config)

    def find(self, holdout: str | Mapping[str, Any]) -> Source:
        """The holdout as an entry under `datasets`: one without a `type`, or a mere path, is read as the run's first dataset is."""
        given = {"path": holdout} if isinstance(holdout, str) else {k: v for k, v in holdout.items() if v is not None}
        if not given.get("path"):
            raise ICAError("ica.holdout: the dataset entry has no `path`.")
        name = given["path"]
        file = local_path(name)
        given |= {key: expanded(given[key]) for key in ("path", "data_files") if key in given}
        reading = {}
        if "type" not in given and self.cfg.datasets:
            reading = {k: v for k, v in dict(self.cfg.datasets[0]).items() if k not in LOCATION_KEYS}
        return Source(name, DictDefault({**reading, **given}), file)

    def read(self, source: Source) -> Dataset:
        """Tokenised rows for SFT; prompt, chosen, … as text for preference runs."""
        with tempfile.TemporaryDirectory() as prepared:
            run = DictDefault(copy.deepcopy(dict(self.cfg)))
            run.update(
                datasets=[source.entry],
                test_datasets=None,
                val_set_size=0,
                sample_packing=False,
                shuffle_merged_datasets=False,
                dataset_exact_deduplication=False,
                excess_length_strategy="raise",
                dataset_prepared_path=prepared,
                push_dataset_to_hub=None,
                # Rows with images stay as they are until the collator takes them.
                skip_prepare_dataset=bool(self.cfg.processor_type and self.cfg.skip_prepare_dataset),
                # A step count for the holdout means nothing, but the loaders compute one.
                max_steps=None,
            )
            return (prepare_preference_datasets if self.cfg.rl else prepare_datasets)(run, self.tokenizer)[0]

    def prepare(self, name: str, dataset: Dataset) -> Any:
        return prepare_like_train(self.trainer, dataset) if self.cfg.rl else dataset

    def why_empty(self, source: Source) -> str:
        return f"has no rows with a supervised token under `type: {source.entry.type}`"

    def explain(self, error: Exception, source: Source) -> str:
        return _explain(error, self.cfg)


def load_holdout(cfg: DictDefault, config: ICAConfig, tokenizer: Any) -> tuple[str, Dataset]:
    """(name for messages, rows) of one holdout set, as Axolotl's loaders give them."""
    return AxolotlHoldout(cfg, tokenizer).dataset(config)


def _explain(error: Exception, cfg: DictDefault) -> str:
    text = f"{type(error).__name__}: {error}"
    causes, cause = [text], error.__cause__ or error.__context__
    while cause is not None:
        causes.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
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
