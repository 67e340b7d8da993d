"""LLaMA-Factory: `ica-llamafactory` in place of `llamafactory-cli`, and the holdout through its own loader and template.

LLaMA-Factory 0.9 has no plugin registry and never hands its trainer to a callback. So, only while its `run_exp` runs,
`transformers.Trainer.train` first attaches to the trainer (`_attaching`); and only while its launcher runs, that launcher
starts this module in place of itself (`_launching`). Nothing of the host is copied, subclassed or reloaded.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import gc
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, Trainer

from ..callback import ICACallback
from ..config import ICAConfig, parse_config
from ..errors import ICAError
from ..examples import Example, read_examples
from ..holdout import check_holdout, joined, json_error
from ..versions import warn_if_untested
from ..weights_file import read_weights
from .trainer import SHARDED, attach_examples

MODULE = "ica_plugin.hosts.llamafactory"
# Stage of a run → the name under which LLaMA-Factory's loader knows its rows.
STAGES = {"sft": "sft", "dpo": "rm", "kto": "kto"}
PREFERENCE_LOSSES = ("sigmoid", "ipo", "hinge", "orpo", "simpo")
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


def main() -> None:
    """The console script `ica-llamafactory`: everything that `llamafactory-cli` does, and `train` with an `ica:` block."""
    try:
        _run_command()
    except ICAError as error:
        sys.exit(f"[ica] error: {error}")


def _run_command() -> None:
    from llamafactory import cli
    from llamafactory.hparams import read_args

    # LLaMA-Factory's launcher gives the processes that torchrun starts no command, only its arguments.
    worker = "LOCAL_RANK" in os.environ
    given = sys.argv[1:]
    if given[:1] != ["train"] and not (worker and given and given[0].endswith((".yaml", ".yml", ".json"))):
        return cli.main()
    arguments = given[1:] if given[:1] == ["train"] else given
    sys.argv[1:] = arguments
    args = read_args()
    ours = isinstance(args, dict) and "ica" in args
    if ours:
        refuse_unsupported(args, parse_config(args["ica"]))
    if worker:
        from llamafactory.train import tuner

        return run_exp(args) if ours else tuner.run_exp(args)
    sys.argv[1:] = ["train", *arguments]
    if not ours:
        return cli.main()
    with _launching(lambda: run_exp(args)):
        cli.main()


def run_exp(args: dict[str, Any], callbacks: list[Any] | None = None) -> None:
    """LLaMA-Factory's `run_exp`, with an `ica:` block among its arguments.

    Args:
        args: a LLaMA-Factory config as a dict, with `ica`.
        callbacks: as LLaMA-Factory takes them.

    Raises:
        ICAError: a wrong key, or a run that cannot be weighted.
    """
    from llamafactory.train import tuner

    args = dict(args)
    config = parse_config(args.pop("ica", None))
    refuse_unsupported(args, config)
    warn_if_untested("llamafactory")
    with _attaching(config) as attached:
        tuner.run_exp(args, callbacks)
    trained = bool(attached)
    attached.clear()
    # What is wrapped on a trainer makes it a cycle. Left to the interpreter's end, its process group's threads may abort the process.
    gc.collect()
    if not trained:
        raise ICAError(
            "LLaMA-Factory trained without handing its trainer to transformers' `train()`, so no row was weighted. Please report "
            "the config and the version of LLaMA-Factory."
        )


@contextlib.contextmanager
def _attaching(config: ICAConfig) -> Iterator[list[ICACallback]]:
    """Inside the block, a LLaMA-Factory trainer is attached to before it trains. Yields the callbacks attached so far."""
    host_train = Trainer.train
    attached: list[ICACallback] = []

    def train(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        attached.append(attach(trainer, config))
        return host_train(trainer, *args, **kwargs)

    Trainer.train = train
    try:
        yield attached
    finally:
        Trainer.train = host_train


@contextlib.contextmanager
def _launching(train: Callable[[], None]) -> Iterator[None]:
    """Inside the block, LLaMA-Factory's launcher calls `train`, or has torchrun start this module."""
    from llamafactory import launcher
    from llamafactory.train import tuner

    host_file, host_run = launcher.__file__, tuner.run_exp

    def run() -> None:
        tuner.run_exp = host_run
        train()

    # The launcher writes its own file's name into torchrun's command line, where a module may stand too.
    launcher.__file__, tuner.run_exp = f"-m {MODULE}", run
    try:
        yield
    finally:
        launcher.__file__, tuner.run_exp = host_file, host_run


def refuse_unsupported(args: dict[str, Any], config: ICAConfig) -> None:
    """Raise ICAError for runs that cannot be weighted, before a model is loaded.

    Args:
        args: a LLaMA-Factory config.
        config: its `ica:` block.
    """
    from llamafactory.extras.misc import is_env_enabled, use_ray

    if not args.get("do_train"):
        raise ICAError("there is an `ica:` block but `do_train` is not true, so nothing is trained. Set it, or remove the block.")
    stage = args.get("stage", "sft")
    if stage not in STAGES:
        raise ICAError(f"stage: {stage} is not supported by ica_plugin; supported: {', '.join(STAGES)}.")
    loss = args.get("pref_loss", "sigmoid")
    if stage == "dpo" and loss not in PREFERENCE_LOSSES:
        raise ICAError(
            f"pref_loss: {loss} couples the rows of a batch, so no single row's gradient can be weighted. Use one of "
            f"{', '.join(PREFERENCE_LOSSES)}."
        )
    if stage == "dpo" and float(args.get("pref_bco_weight") or 0) > 0:
        raise ICAError(
            "pref_bco_weight adds the BCO loss, which couples rows by a running mean over batches, so no single row's gradient "
            "can be weighted. Remove pref_bco_weight."
        )
    for key in ("deepspeed", "fsdp"):
        if args.get(key):
            raise ICAError(f"{key} {SHARDED}")
    elsewhere = [name for name in ("USE_MCA", "USE_V1") if is_env_enabled(name)]
    elsewhere += [name for name in ("use_hyper_parallel", "use_ray") if args.get(name)]
    if use_ray():
        elsewhere.append("USE_RAY")
    if elsewhere:
        raise ICAError(
            f"{elsewhere[0]} trains outside transformers' Trainer in this process, which ica_plugin cannot reach. Unset it."
        )
    if config.weights is not None and (moved := _renumbering(args)):
        raise ICAError(
            f"`ica.weights` names rows by their place in the dataset, and `{moved}` puts rows elsewhere. Remove it (for an evaluation set "
            "of its own there is `eval_dataset`)."
        )


def _renumbering(args: Mapping[str, Any]) -> str:
    """The setting that puts rows elsewhere than in the dataset; "" where they stand as there."""
    moves = {
        "neat_packing": args.get("neat_packing"),  # which sets the next
        "packing": args.get("packing"),
        "val_size": float(args.get("val_size") or 0) > 0,
        "mix_strategy": args.get("mix_strategy", "concat") != "concat",
    }
    return next((f"{key}: {args[key]}" for key, moved in moves.items() if moved), "")


def attach(trainer: Trainer, config: ICAConfig) -> ICACallback:
    """Attach to a trainer that LLaMA-Factory built.

    Args:
        trainer: with the callback that carries the run's arguments, as `run_exp` makes it.
        config: the block.

    Raises:
        ICAError: what cannot be weighted exactly.
    """
    from llamafactory.train.callbacks import ReporterCallback

    run = next((c for c in trainer.callback_handler.callbacks if isinstance(c, ReporterCallback)), None)
    if run is None:
        raise ICAError("the trainer was not built by LLaMA-Factory's `run_exp`; use `ica_plugin.attach(trainer, …)` for it.")
    for column in ("images", "videos", "audios"):
        feature = getattr(trainer.train_dataset, "features", {}).get(column)
        if feature is not None and getattr(feature, "dtype", None) != "null":
            raise ICAError(
                f"the training rows have `{column}`, and ica_plugin cannot score multimodal rows yet. Remove the `ica:` block."
            )
    moved = _renumbering(vars(run.data_args))
    return attach_examples(
        trainer,
        config,
        read_holdout=lambda one: _read_holdout(trainer, one, run),
        moved_rows=f"`{moved}` puts them elsewhere" if moved else "",
    )


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


def validate(path: Path) -> dict[str, Any]:
    """Check a config, its train rows and its holdout without loading the model.

    Returns:
        what was found, by name.

    Raises:
        ICAError: what is wrong.
    """
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    warn_if_untested("llamafactory")
    args = yaml.safe_load(path.read_text())
    config = parse_config(args.pop("ica", None))
    refuse_unsupported(args, config)
    try:
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(args)
        tokenizer = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)
        stage = STAGES[finetuning_args.stage]
        with contextlib.redirect_stdout(io.StringIO()):
            train = get_dataset(template, model_args, data_args, training_args, stage=stage, **tokenizer)["train_dataset"]
    except Exception as error:  # its own checks raise many types
        raise ICAError(f"LLaMA-Factory refuses the config or its data: {type(error).__name__}: {error}") from error
    found: dict[str, Any] = {"rows": len(train)}
    if config.weights is not None:
        weights = read_weights(config.weights, len(train))
        return {**found, "weights": f"{config.weights}, mean {sum(weights) / len(weights):.3g}"}
    sets = {
        name: load_holdout(one, model_args, data_args, training_args, stage, template, tokenizer)
        for name, one in config.sets.items()
    }
    model = AutoConfig.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=model_args.trust_remote_code
    ).get_text_config()
    context, rows_of_run = getattr(model, "max_position_embeddings", None), read_examples(train, _one_row)
    holdout = joined(
        {
            name: check_holdout(
                source, _not_too_long(source, read_examples(rows, _one_row), data_args.cutoff_len), rows_of_run, context
            )
            for name, (source, rows) in sets.items()
        }
    )
    return {
        **found,
        "holdout rows": ", ".join(f"{len(rows)} ({source})" for source, rows in sets.values()),
        "usable as demonstrations": len(holdout.shown),
        "train rows that are also in the holdout": holdout.rows_in_train,
        "block": config.model_dump(exclude_none=True),
    }


def attached(path: Path, changes: dict[str, Any]) -> tuple[ICACallback, None]:
    """The trainer that `ica-llamafactory train` would build, with the plugin attached, and nothing trained.

    Args:
        path: the config.
        changes: keys of the `ica:` block that replace the config's.

    Returns:
        the callback, and None: LLaMA-Factory keeps the rows in the order of the file, or the callback's files say that it does not.

    Raises:
        ICAError: what is wrong with the config.
    """
    from llamafactory.train import tuner

    warn_if_untested("llamafactory")
    args = yaml.safe_load(path.read_text())
    block = parse_config(args.pop("ica", None)).model_dump(exclude_unset=True)
    config = parse_config({**block, "weights": None, **changes})
    refuse_unsupported(args, config)
    found: list[ICACallback] = []

    class Attached(Exception):
        pass

    def stop(trainer: Trainer, *_: Any, **__: Any) -> None:
        found.append(attach(trainer, config))
        raise Attached

    host_train = Trainer.train
    Trainer.train = stop
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Attached):
            tuner.run_exp({**args, "output_dir": folder, "report_to": "none", "plot_loss": False})
    finally:
        Trainer.train = host_train
    if not found:
        raise ICAError(
            "LLaMA-Factory ended without handing its trainer to transformers' `train()`; please report the config and its version."
        )
    return found[0], None


def _one_row(features: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: torch.tensor([value]) for key, value in features[0].items() if value is not None}


if __name__ == "__main__":
    main()
