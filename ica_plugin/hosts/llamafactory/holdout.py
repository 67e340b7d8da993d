"""The holdout through LLaMA-Factory's own loader and template."""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer

from ...data.loaders import HoldoutLoader, Source, expanded
from ...errors import ICAError

# Stage of a run → the name under which LLaMA-Factory's loader knows its rows.
STAGES = {"sft": "sft", "dpo": "rm", "kto": "kto"}

# Keys of an entry of dataset_info.json that say where its rows are; the others say how to read them.
LOCATION_KEYS = {
    "file_name",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
    "subset",
    "split",
    "folder",
    "num_samples",
}

NO_LIMIT = 1 << 30


class LlamaFactoryHoldout(HoldoutLoader):
    """The holdout through LLaMA-Factory's own loader, template and collator.

    Args:
        model_args, data_args, training_args: the run's.
        stage: as LLaMA-Factory's loader names it.
        template: the run's.
        tokenizer: `tokenizer` and `processor`, as `load_tokenizer` returns them.
    """

    def __init__(self, model_args: Any, data_args: Any, training_args: Any, stage: str, template: Any, tokenizer: dict[str, Any]):
        self.model_args, self.data_args, self.training_args = model_args, data_args, training_args
        self.stage, self.template, self.tokenizer = stage, template, tokenizer
        self.limit = "cutoff_len", data_args.cutoff_len

    @classmethod
    def of(cls, trainer: Trainer, run: Any) -> LlamaFactoryHoldout:
        """For a trainer that LLaMA-Factory built; `run` holds the run's arguments."""
        collator = trainer.data_collator
        tokenizer = {"tokenizer": trainer.processing_class, "processor": collator.processor}
        stage = STAGES[run.finetuning_args.stage]
        loader = cls(run.model_args, run.data_args, trainer.args, stage, collator.template, tokenizer)
        loader.collator = collator
        return loader

    def find(self, holdout: str | Mapping[str, Any]) -> Source:
        """A name in dataset_info.json, a path in the format of the run's first dataset, or an entry as in dataset_info.json."""
        known, dataset_dir = dataset_info(self.data_args.dataset_dir), self.data_args.dataset_dir
        if isinstance(holdout, str) and holdout in known:
            return Source(holdout, None)
        first = known.get(self.data_args.dataset[0], {}) if self.data_args.dataset else {}
        reading = {key: value for key, value in first.items() if key not in LOCATION_KEYS}
        if isinstance(holdout, str):
            path = Path(holdout).expanduser()
            if not path.exists():
                near = difflib.get_close_matches(holdout, known, n=1)
                hint = f" Did you mean `{near[0]}`?" if near else ""
                raise ICAError(
                    f"ica.holdout: {holdout} is neither a dataset in {dataset_dir}/dataset_info.json nor a file (looked for "
                    f"{path.absolute()}).{hint}"
                )
            return Source(holdout, {**reading, "file_name": str(path.absolute())}, path)
        entry = dict(holdout) if {"formatting", "columns"} & holdout.keys() else {**reading, **holdout}
        name, file = str(next((entry[key] for key in entry if key in LOCATION_KEYS), "holdout")), None
        if "file_name" in entry:
            folder = Path(dataset_dir) if isinstance(dataset_dir, str) else Path()
            file = folder / expanded(entry["file_name"])
            if not file.exists():
                raise ICAError(f"ica.holdout: {entry['file_name']}: no such file or folder (looked for {file.absolute()}).")
            entry["file_name"] = str(file.absolute())
        return Source(name, entry, file)

    def read(self, source: Source) -> Any:
        """Tokenised rows, never cut or packed."""
        from llamafactory.data import get_dataset

        data_args = copy.copy(self.data_args)
        settings = {
            "dataset": [source.name],
            "eval_dataset": None,
            "val_size": 0.0,
            "max_samples": None,
            "packing": False,
            "neat_packing": False,
            "tokenized_path": None,
            "streaming": False,
            "mix_strategy": "concat",
            "cutoff_len": NO_LIMIT,
        }
        for key, value in settings.items():
            setattr(data_args, key, value)
        arguments = (self.template, self.model_args, data_args, self.training_args)
        with tempfile.TemporaryDirectory() as folder:
            if source.entry is not None:
                (Path(folder) / "dataset_info.json").write_text(json.dumps({source.name: source.entry}))
                data_args.dataset_dir = folder
            with contextlib.redirect_stdout(io.StringIO()):  # the loader prints its first row as a "training example"
                return get_dataset(*arguments, stage=self.stage, **self.tokenizer)["train_dataset"]

    def explain(self, error: Exception, source: Source) -> str:
        return (
            f"LLaMA-Factory cannot read it as the run's data: {type(error).__name__}: {error}. Give rows in the format of the run's "
            "first dataset, or a name or an entry as in dataset_info.json."
        )


def dataset_info(dataset_dir: str | dict[str, Any]) -> dict[str, Any]:
    """What dataset_info.json says, by name; empty where there is none."""
    if isinstance(dataset_dir, dict):
        return dataset_dir
    path = Path(dataset_dir) / "dataset_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}
