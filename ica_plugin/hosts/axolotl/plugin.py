"""The plugin class."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault

from ...run.attach import attach_examples
from ...versions import warn_if_untested
from .args import config_of, moved_rows, refuse_unsupported
from .holdout import AxolotlHoldout


class ICAPlugin(BasePlugin):
    """Weights every training row by its ICA score. See docs/quickstart.md."""

    def get_input_args(self) -> str:
        return "ica_plugin.hosts.axolotl.args.ICAArgs"

    def register(self, cfg: DictDefault) -> None:
        # The config as the user gave it: what it tells is refused before data or model are loaded.
        refuse_unsupported(cfg)

    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        warn_if_untested("axolotl")
        refuse_unsupported(cfg)
        config = config_of(cfg)
        read_holdout = AxolotlHoldout(cfg, trainer.processing_class, trainer)
        attach_examples(trainer, config, read_holdout=read_holdout, moved_rows=moved_rows(cfg))
        _shorten(trainer.args, cfg, config.epoch_share)


def _shorten(args: Any, cfg: DictDefault, share: float) -> None:
    """Steps of a run whose epochs have a share of the rows as places.

    Axolotl counts steps by the whole dataset before it builds the trainer, and gives them to it as `max_steps`, and warm-up as
    their share (core/builders/base.py). Without `max_steps` the trainer counts by its own data loader, as transformers does.
    """
    if share == 1 or cfg.max_steps:
        return
    args.max_steps = -1
    if cfg.warmup_steps is None and args.warmup_steps >= 1:  # below 1 it is a share of the steps already
        args.warmup_steps = round(args.warmup_steps * share)
