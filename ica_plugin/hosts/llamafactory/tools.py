"""What `ica-plugin` asks of LLaMA-Factory: validate a config, and the trainer it builds."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, Trainer

from ...config import parse_config
from ...data.summary import summary
from ...errors import ICAError
from ...run.callback import ICACallback
from ...versions import warn_if_untested
from .attach import attach, refuse_rows, refuse_unsupported
from .holdout import STAGES, LlamaFactoryHoldout


def validate(path: Path) -> dict[str, Any]:
    """Check a config, its train rows and its holdout without loading the model.

    Returns:
        what was found, by name.

    Raises:
        ICAError: what is wrong.
    """
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.extras.misc import has_tokenized_data
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    warn_if_untested("llamafactory")
    args = yaml.safe_load(path.read_text())
    config = parse_config(args.pop("ica", None))
    refuse_unsupported(args, config)
    if args.get("tokenized_path") and not has_tokenized_data(args["tokenized_path"]):
        del args["tokenized_path"]  # the rows would be written there
    try:
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(args)
        tokenizer = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)
        stage = STAGES[finetuning_args.stage]
        with contextlib.redirect_stdout(io.StringIO()):
            train = get_dataset(template, model_args, data_args, training_args, stage=stage, **tokenizer)["train_dataset"]
    except Exception as error:  # its own checks raise many types
        raise ICAError(f"LLaMA-Factory refuses the config or its data: {type(error).__name__}: {error}") from error
    refuse_rows(train, data_args)
    load = LlamaFactoryHoldout(model_args, data_args, training_args, stage, template, tokenizer)
    model = AutoConfig.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=model_args.trust_remote_code
    ).get_text_config()
    return summary(config, train, load, context=getattr(model, "max_position_embeddings", None))


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
