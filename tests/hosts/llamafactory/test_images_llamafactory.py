"""Vision-language models in LLaMA-Factory: rows of text, and rows with images."""

import pytest

import tiny
import tiny_vision
from checks import check_all_weights_one, check_gradients, check_scores
from llamafactory_harness import Maker
from vision_checks import check_image_scores


@pytest.fixture
def make(tmp_path, qwen):
    return lambda kind, rows, **settings: Maker(tmp_path, qwen, kind, rows, template="qwen2_vl", **settings)


def test_text_rows_score_as_text(make, tmp_path):
    """The collator gives each batch of text an image, whose tokens are masked."""
    maker = make("sft", tiny.sft_rows(8))
    check_gradients(maker, tmp_path, token_mean=True)
    check_all_weights_one(maker, tmp_path)
    check_scores(maker(ica={"k": 2}), lambda row: ([(row["input_ids"], [label != -100 for label in row["labels"]])], True))


def lines_of(trainer, row: int) -> list[dict]:
    """A row collated alone, without the positions, which are the model's own."""
    collator = trainer.data_collator
    batch = collator([dict(trainer.train_dataset[row])])
    media = {key: batch[key] for key in ("pixel_values", "image_grid_thw")}
    return [{key: batch[key][:1] for key in ("input_ids", "attention_mask", "labels")} | media]


def test_rows_with_images(make, tmp_path):
    rows = tiny_vision.image_rows(tmp_path, 6)
    maker = make("sft", rows, holdout=rows[:3])
    check_image_scores(maker(ica={"k": 2}), lines_of)
    check_gradients(maker, tmp_path, token_mean=True)
    check_all_weights_one(maker, tmp_path)
