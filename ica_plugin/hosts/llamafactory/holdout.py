"""The holdout through LLaMA-Factory's own loader and template."""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import Trainer

from ...config import ICAConfig
from ...data.loaders import json_error
from ...data.read import read_examples
from ...data.store import Example
from ...errors import ICAError
from .attach import STAGES

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


def _read_holdout(trainer: Trainer, config: ICAConfig, run: Any) -> tuple[str, list[Example]]:
    """The holdout through LLaMA-Factory's own loader, template and collator; `run` holds the run's arguments."""
    collator = trainer.data_collator
    name, rows = load_holdout(
        config,
        run.model_args,
        run.data_args,
        trainer.args,
        STAGES[run.finetuning_args.stage],
        collator.template,
        {"tokenizer": trainer.processing_class, "processor": collator.processor},
    )
    return name, _not_too_long(name, read_examples(rows, collator), run.data_args.cutoff_len)


def load_holdout(
    config: ICAConfig, model_args: Any, data_args: Any, training_args: Any, stage: str, template: Any, tokenizer: dict[str, Any]
) -> tuple[str, Any]:
    """Read the holdout through LLaMA-Factory's own loader and template.

    Args:
        config: the block.
        model_args, data_args, training_args: the run's.
        stage: as LLaMA-Factory's loader names it.
        template: the run's.
        tokenizer: `tokenizer` and `processor`, as `load_tokenizer` returns them.

    Returns:
        (name for messages, tokenised rows, never cut or packed).

    Raises:
        ICAError: the holdout cannot be read as the run's data is.
    """
    from llamafactory.data import get_dataset

    name, entry = holdout_entry(data_args, config.holdout)
    data_args = copy.copy(data_args)
    settings = {
        "dataset": [name],
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
    with tempfile.TemporaryDirectory() as folder:
        if entry is not None:
            (Path(folder) / "dataset_info.json").write_text(json.dumps({name: entry}))
            data_args.dataset_dir = folder
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the loader prints its first row as a "training example"
                return name, get_dataset(template, model_args, data_args, training_args, stage=stage, **tokenizer)[
                    "train_dataset"
                ]
        except Exception as error:
            malformed = json_error(entry.get("file_name", "")) if entry else None
            if malformed:
                raise ICAError(f"ica.holdout: malformed json: {malformed}. Correct or remove that line.") from error
            raise ICAError(
                f"ica.holdout: {name}: LLaMA-Factory cannot read it as the run's data: {type(error).__name__}: {error}. Give rows in "
                "the format of the run's first dataset, or a name or an entry as in dataset_info.json."
            ) from error


def _not_too_long(name: str, examples: list[Example], limit: int) -> list[Example]:
    too_long = [row for row, example in enumerate(examples) if example.longest > limit]
    if too_long:
        raise ICAError(
            f"ica.holdout: {name}: {len(too_long)} row(s) are longer than cutoff_len ({limit}), first row {too_long[0]} with "
            f"{examples[too_long[0]].longest} tokens. Shorten or remove them, or raise cutoff_len."
        )
    return examples


def holdout_entry(data_args: Any, holdout: str | dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The holdout as a name in dataset_info.json.

    Args:
        data_args: the run's.
        holdout: such a name, a path in the format of the run's first dataset, or an entry as in dataset_info.json.

    Returns:
        (name, None) for a name that is there, else (name, entry) with an entry to add.

    Raises:
        ICAError: neither a name nor a file.
    """
    known = _dataset_info(data_args.dataset_dir)
    if isinstance(holdout, str) and holdout in known:
        return holdout, None
    first = known.get(data_args.dataset[0], {}) if data_args.dataset else {}
    reading = {key: value for key, value in first.items() if key not in LOCATION_KEYS}
    if isinstance(holdout, str):
        path = Path(holdout).expanduser()
        if not path.exists():
            near = difflib.get_close_matches(holdout, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ICAError(
                f"ica.holdout: {holdout} is neither a dataset in {data_args.dataset_dir}/dataset_info.json nor a file (looked for "
                f"{path.absolute()}).{hint}"
            )
        return holdout, {**reading, "file_name": str(path.absolute())}
    entry = dict(holdout) if {"formatting", "columns"} & holdout.keys() else {**reading, **holdout}
    if "file_name" in entry and isinstance(data_args.dataset_dir, str):
        entry["file_name"] = str((Path(data_args.dataset_dir) / entry["file_name"]).absolute())
    return str(next((entry[key] for key in entry if key in LOCATION_KEYS), "holdout")), entry


def _dataset_info(dataset_dir: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(dataset_dir, dict):
        return dataset_dir
    path = Path(dataset_dir) / "dataset_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}
