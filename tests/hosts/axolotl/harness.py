"""Builds Axolotl's own trainers in this process, by its own functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import tiny

SFT = {"type": "chat_template", "field_messages": "messages"}
PAIR = {"type": "chat_template.default", "field_messages": "messages"}


def write_config(
    folder: Path, model: Path, kind: str, rows: list[dict], holdout: list[dict], ica: dict | None, **settings
) -> Path:
    """Write data and an Axolotl config. `kind`: sft, dpo, ipo, simpo, orpo or kto."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_jsonl(folder / "train.jsonl", rows)
    tiny.write_jsonl(folder / "holdout.jsonl", holdout)
    data = {"path": str(folder / "train.jsonl"), **(SFT if kind == "sft" else PAIR)}
    if kind == "orpo":
        data = {"path": str(folder / "train.jsonl"), "type": "chat_template.argilla"}
    if kind == "kto":
        data = {"path": str(folder / "train.jsonl"), "type": "chatml.argilla"}
    config = {
        "base_model": str(model),
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "seed": 7,
        "bf16": False,
        "attn_implementation": "sdpa",
        "save_strategy": "no",
        "logging_steps": 1,
        "val_set_size": 0,
        "dataset_num_proc": 1 if settings.get("sample_packing") else 0,
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "datasets": [data],
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_mlp_kernel": False,
    }
    if kind != "sft":
        config["rl"] = kind
    if kind == "simpo":
        config.update(rl_beta=2.0, cpo_alpha=0.1, simpo_gamma=0.5)
    if kind == "orpo":
        config["orpo_alpha"] = 0.1
    if kind == "kto":
        config["remove_unused_columns"] = False
    config.update(settings)
    if ica is not None:
        config["plugins"] = ["ica_plugin.ICAPlugin"]
        config["ica"] = (
            {**tiny.NAMED, **ica} if "weights" in ica else {"holdout": str(folder / "holdout.jsonl"), **tiny.NAMED, **ica}
        )
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    return path


def load_config(path: Path):
    """The validated config, with a fresh plugin registry."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()
    return load_cfg(str(path))


def build(path: Path):
    """The trainer that `axolotl train` would build from this file."""
    import axolotl.utils.data.rl
    import axolotl.utils.data.sft
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.train import setup_model_and_trainer

    # The cache of prepared data is written by a pool of processes, which takes seconds and serves nothing here.
    axolotl.utils.data.sft.save_preprocessed_dataset = lambda *args: None
    axolotl.utils.data.rl.save_preprocessed_dataset = lambda *args: None
    cfg = load_config(path)
    torch.manual_seed(0)  # Axolotl does not seed a new adapter
    meta = load_preference_datasets(cfg=cfg) if cfg.rl else load_datasets(cfg=cfg)
    return setup_model_and_trainer(cfg, meta)[0]


class Maker:
    """`make_trainer` of tests/checks.py for one kind of Axolotl run."""

    def __init__(self, folder: Path, model: Path, kind: str, rows: list[dict], holdout: list[dict], **settings):
        self.folder, self.model, self.kind, self.rows, self.holdout, self.settings = folder, model, kind, rows, holdout, settings
        self.built = 0

    def __call__(self, *, ica, micro_batch: int = 2, accumulation: int = 1, max_steps: int | None = None, **more):
        self.built += 1
        block = ica(len(self.rows)) if callable(ica) else ica
        settings = {
            **self.settings,
            **more,
            "micro_batch_size": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": max_steps,
        }
        return build(
            write_config(self.folder / str(self.built), self.model, self.kind, self.rows, self.holdout, block, **settings)
        )


@pytest.fixture
def maker(tmp_path, tiny_model):
    def make(kind: str, rows: list[dict], holdout: list[dict] | None = None, model: Path = tiny_model, **settings) -> Maker:
        default = {"sft": tiny.sft_rows, "kto": tiny.kto_rows, "orpo": tiny.argilla_rows}.get(kind, tiny.pair_rows)
        return Maker(tmp_path, model, kind, rows, holdout or default(6, seed=99), **settings)

    return make
