"""Attach to a trainer that LLaMA-Factory built; what is refused by the config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer

from ...config import ICAConfig
from ...data.media import MEDIA_COLUMNS
from ...errors import ICAError
from ...run.attach import attach_examples
from ...run.callback import ICACallback
from ...training.refusals import CHOOSE_ROWS, SHARDED
from .holdout import STAGES, LlamaFactoryHoldout, dataset_info

PREFERENCE_LOSSES = ("sigmoid", "ipo", "hinge", "orpo", "simpo")


def refuse_unsupported(args: dict[str, Any], config: ICAConfig) -> None:
    """Raise ICAError for runs that cannot be weighted, before a model is loaded.

    Args:
        args: a LLaMA-Factory config.
        config: its `ica:` block.
    """
    from llamafactory.extras.misc import has_tokenized_data, is_env_enabled, use_ray

    if not args.get("do_train"):
        raise ICAError("there is an `ica:` block but `do_train` is not true, so nothing is trained. Set it, or remove the block.")
    stage = args.get("stage", "sft")
    if stage not in STAGES:
        raise ICAError(
            f"stage: {stage} is not supported by ica_plugin; supported: {', '.join(STAGES)}. Or choose rows beforehand: `ica-plugin score` "
            "with a config of the same data in one of these stages, `ica-plugin select`, and train what was selected without the plugin."
        )
    loss = args.get("pref_loss", "sigmoid")
    if stage == "dpo" and loss not in PREFERENCE_LOSSES:
        raise ICAError(
            f"pref_loss: {loss} couples the rows of a batch, so no single row's gradient can be weighted. Use one of "
            f"{', '.join(PREFERENCE_LOSSES)}. {CHOOSE_ROWS}"
        )
    if stage == "dpo" and float(args.get("pref_bco_weight") or 0) > 0:
        raise ICAError(
            "pref_bco_weight adds the BCO loss, which couples rows by a running mean over batches, so no single row's gradient "
            f"can be weighted. Remove pref_bco_weight. {CHOOSE_ROWS}"
        )
    config.check_kind({"dpo": "pair", "kto": "unpaired"}.get(stage, "sft"))
    for key in ("deepspeed", "fsdp"):
        if args.get(key):
            raise ICAError(f"{key} {SHARDED}")
    elsewhere = [name for name in ("USE_MCA", "USE_V1") if is_env_enabled(name)]
    elsewhere += [name for name in ("use_hyper_parallel", "use_ray") if args.get(name)]
    if use_ray():
        elsewhere.append("USE_RAY")
    if elsewhere:
        raise ICAError(
            f"{elsewhere[0]} trains outside transformers' Trainer in this process, which ica_plugin cannot reach. Unset it. {CHOOSE_ROWS}"
        )
    if config.weights is not None and (moved := _renumbering(args)):
        raise ICAError(
            f"`ica.weights` names rows by their place in the dataset, and `{moved}` puts rows elsewhere. Remove it (for an evaluation set "
            "of its own there is `eval_dataset`)."
        )
    if config.weights is not None and has_tokenized_data(args.get("tokenized_path") or ""):
        raise ICAError(
            "`ica.weights` names rows by their place in the dataset, and the rows in `tokenized_path` were prepared before, by settings "
            "that may have put them elsewhere (`packing`, `num_samples`, `val_size`) and that LLaMA-Factory does not keep. Remove "
            "`tokenized_path`."
        )


def refuse_rows(dataset: Any, data_args: Any) -> None:
    """Raise ICAError for tokenised rows that show what cannot be put behind demonstrations.

    Args:
        dataset: the train rows as LLaMA-Factory's loader returns them.
        data_args: the run's.
    """
    shown = {
        column
        for column in MEDIA_COLUMNS
        if (feature := dataset.features.get(column)) is not None and getattr(feature, "dtype", None) != "null"
    }
    if "audios" in shown:
        raise ICAError(
            "the training rows have `audios`, and ica_plugin cannot put sound behind demonstrations. Remove the `ica:` block."
        )
    if shown and data_args.packing:
        raise ICAError(
            f"the training rows have `{min(shown)}`, and packed rows with images cannot be taken apart. Remove `packing`."
        )


def _renumbering(args: Mapping[str, Any]) -> str:
    """The setting that puts rows elsewhere than in the dataset; "" where they stand as there."""
    moves = {
        "neat_packing": args.get("neat_packing"),  # which sets the next
        "packing": args.get("packing"),
        "val_size": float(args.get("val_size") or 0) > 0,
        "mix_strategy": args.get("mix_strategy", "concat") != "concat",
    }
    found = [f"{key}: {args[key]}" for key, moved in moves.items() if moved]
    names, known = args.get("dataset") or [], dataset_info(args.get("dataset_dir", "data"))
    for name in [each.strip() for each in names.split(",")] if isinstance(names, str) else names:
        number = known.get(name, {}).get("num_samples")
        if number is not None:  # the loader takes so many in random order, also where that is all
            found.append(f"num_samples: {number}` of `{name}` in `dataset_info.json")
    return next(iter(found), "")


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
    refuse_rows(trainer.train_dataset, run.data_args)
    moved = _renumbering(vars(run.data_args))
    moved_rows = f"`{moved}` puts them elsewhere" if moved else ""
    return attach_examples(trainer, config, read_holdout=LlamaFactoryHoldout.of(trainer, run), moved_rows=moved_rows)
