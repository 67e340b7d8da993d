"""Rows with images in TRL: prompts and completions, whole chats."""

import inspect
import random

import pytest
import trl
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig

import ica_plugin
import tiny
import tiny_vision
from checks import check_all_weights_one, check_gradients
from ica_plugin.errors import ICAError
from trl_harness import training_arguments, trl_class
from vision_checks import check_image_scores

TRL_1 = Version(trl.__version__).major >= 1


def rows_of(kind: str, n: int, seed: int = 0) -> list[dict]:
    """Rows with one picture each, every third with two; the first two differ in their pictures alone."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        pictures = [tiny_vision.picture(rng) for _ in range(1 + (i % 3 == 2))]
        question = [{"role": "user", "content": tiny.shuffled(rng)}]
        answers = [[{"role": "assistant", "content": tiny.shuffled(rng)}] for _ in range(2)]
        row = {
            "chat": lambda: {"messages": question + answers[0]},  # noqa: B023
            "completion": lambda: {"prompt": question, "completion": answers[0]},  # noqa: B023
            "pair": lambda: {"prompt": question, "chosen": answers[0], "rejected": answers[1]},  # noqa: B023
        }[kind]()
        rows.append({"images": pictures} | row)
    rows[1] = rows[0] | {"images": rows[1]["images"]}
    return rows


class Maker:
    """`make_trainer` of tests/checks.py for rows with images."""

    def __init__(self, folder, kind: str, lora: bool = False, **settings):
        self.folder, self.kind, self.lora, self.settings, self.built = folder, kind, lora, settings, 0
        self.rows = rows_of(kind, 6)

    def __call__(self, *, ica, micro_batch: int = 2, accumulation: int = 1, max_steps: int = -1, **more):
        self.built += 1
        family = "DPO" if self.kind == "pair" else "SFT"
        folder = self.folder / str(self.built)
        arguments = training_arguments(folder, micro_batch, accumulation, max_steps) | self.settings | more
        config = trl_class(f"{family}Config")
        if family == "SFT" and not self.lora and "loss_type" in inspect.signature(config).parameters:
            # In TRL ≥ 1.9 the default loss is a fused one, exact for a frozen output embedding alone.
            arguments["loss_type"] = "nll"
        model = tiny_vision.make_llava()
        model.warnings_issued = {}  # as `from_pretrained` leaves it
        trainer = trl_class(f"{family}Trainer")(
            model,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if self.lora else None,
            **({"ref_model": tiny_vision.make_llava()} if family == "DPO" else {}),
            args=config(**arguments),
            train_dataset=Dataset.from_list(self.rows),
            processing_class=tiny_vision.llava_processor(),
        )
        block = ica(len(self.rows)) if callable(ica) else ica
        if block is not None:
            holdout = None if "weights" in block else Dataset.from_list(self.rows[:3])
            ica_plugin.attach(trainer, tiny.NAMED | block, holdout=holdout)
        return trainer


def lines_of(trainer, row: int) -> list[dict]:
    """A row collated alone."""
    return [dict(trainer.data_collator([dict(trainer.train_dataset[row])]))]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_rows_with_images(tmp_path, kind):
    maker = Maker(tmp_path, kind)
    check_image_scores(maker(ica={"k": 2}), lines_of)
    check_gradients(maker, tmp_path, token_mean=True)
    check_all_weights_one(maker, tmp_path)


def test_lora_with_the_default_loss(tmp_path):
    check_gradients(Maker(tmp_path, "completion", lora=True, max_grad_norm=0.0), tmp_path, token_mean=True)


def pair_of(trainer, row: int) -> list[dict]:
    """A pair collated alone: chosen and rejected."""
    batch = dict(trainer.data_collator([dict(trainer.train_dataset[row])]))
    batch["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return [{key: value.chunk(2)[side] for key, value in batch.items() if hasattr(value, "chunk")} for side in (0, 1)]


def test_pairs_with_images(tmp_path):
    maker = Maker(tmp_path, "pair", beta=0.5)
    if not TRL_1:
        with pytest.raises(ICAError, match="row 0: .* the first image of a row alone. Use TRL 1"):
            maker(ica={})
        return
    check_image_scores(maker(ica={"k": 2}), pair_of, sides=2, normalize=True)
    check_gradients(maker, tmp_path, token_mean=False)
    check_all_weights_one(maker, tmp_path)
