"""Rows with images in Axolotl: its multimodal chat collator."""

import pytest

import tiny_vision
from checks import check_all_weights_one, check_gradients
from harness import Maker, write_config
from ica_plugin.hosts.axolotl.tools import validate
from vision_checks import check_image_scores


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    return tiny_vision.save_llava(tmp_path_factory.mktemp("llava"))


SETTINGS = {
    "processor_type": "AutoProcessor",
    "skip_prepare_dataset": True,
    "remove_unused_columns": False,
    "shuffle_merged_datasets": False,
}


def lines_of(trainer, row: int) -> list[dict]:
    """A row collated alone."""
    return [dict(trainer.data_collator([dict(trainer.train_dataset[row])]))]


def test_rows_with_images(tmp_path, llava):
    rows = tiny_vision.message_rows(tmp_path, 6)
    maker = Maker(tmp_path, llava, "sft", rows, rows[:3], **SETTINGS)
    check_image_scores(maker(ica={"k": 2}), lines_of)
    check_gradients(maker, tmp_path, token_mean=True)
    check_all_weights_one(maker, tmp_path)
    # What the run takes is ready for `validate`, which has no collator to make tokens with.
    found = validate(write_config(tmp_path / "validated", llava, "sft", rows, rows[:3], {"k": 2}, **SETTINGS))
    assert found["rows"] == 6 and found["holdout rows"].startswith("3 ")
