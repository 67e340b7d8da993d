"""`ica-llamafactory`: everything that `llamafactory-cli` does, and `train` with an `ica:` block."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers import Trainer

from ...config import ICAConfig, parse_config
from ...errors import V1, ICAError
from ...run.callback import ICACallback
from ...versions import warn_if_untested
from .attach import attach, refuse_unsupported

MODULE = "ica_plugin.hosts.llamafactory"


def main() -> None:
    """The console script `ica-llamafactory`: everything that `llamafactory-cli` does, and `train` with an `ica:` block."""
    try:
        _run_command()
    except ICAError as error:
        sys.exit(f"[ica] error: {error}")


def _run_command() -> Any:
    from llamafactory import cli
    from llamafactory.extras.misc import is_env_enabled
    from llamafactory.hparams import read_args

    if is_env_enabled("USE_V1"):
        refuse_v1(sys.argv[1:])
    # LLaMA-Factory's launcher gives the processes that torchrun starts no command, only its arguments.
    worker = "LOCAL_RANK" in os.environ
    given = sys.argv[1:]
    if given[:1] != ["train"] and not (worker and given and given[0].endswith((".yaml", ".yml", ".json"))):
        cli.main()
        return
    arguments = given[1:] if given[:1] == ["train"] else given
    sys.argv[1:] = arguments
    args = read_args()
    ours = isinstance(args, dict) and "ica" in args
    if ours:
        refuse_unsupported(args, parse_config(args["ica"]))
    if worker:
        from llamafactory.train import tuner

        (run_exp if ours else tuner.run_exp)(args)
        return
    sys.argv[1:] = ["train", *arguments]
    if not ours:
        cli.main()
        return
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


def refuse_v1(arguments: list[str]) -> None:
    """Raise ICAError where a config among the arguments of any v1 command has an `ica:` block."""
    for argument in arguments:
        path = Path(argument)
        if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
            keys = yaml.safe_load(path.read_text())
            if isinstance(keys, dict) and "ica" in keys:
                raise ICAError(V1)


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
