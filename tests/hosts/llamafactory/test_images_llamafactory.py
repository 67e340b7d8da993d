"""Vision-language models in LLaMA-Factory: rows of text, and rows with images."""

import pytest
import yaml

import tiny
import tiny_vision
from checks import check_all_weights_one, check_gradients, check_scores
from ica_plugin.config import parse_config
from ica_plugin.errors import ICAError
from ica_plugin.hosts.llamafactory.attach import attach
from ica_plugin.hosts.llamafactory.tools import validate
from llamafactory_harness import Maker, run_args, write_data
from vision_checks import PIXELS, check_image_scores


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
    media = {key: batch[key] for key in PIXELS if key in batch}
    return [{key: batch[key][:1] for key in ("input_ids", "attention_mask", "labels")} | media]


def pair_rows(tmp_path) -> list[dict]:
    rows, others = tiny_vision.image_rows(tmp_path, 6), tiny_vision.image_rows(tmp_path, 6, seed=1)
    answers = [{"chosen": row["messages"][1], "rejected": other["messages"][1]} for row, other in zip(rows, others, strict=True)]
    pairs = [row | {"messages": row["messages"][:1]} | answer for row, answer in zip(rows, answers, strict=True)]
    pairs[1]["rejected"] = pairs[0]["rejected"]
    return pairs


def pair_of(trainer, row: int) -> list[dict]:
    batch = trainer.data_collator([dict(trainer.train_dataset[row])])
    keys = ("input_ids", "attention_mask", "labels", "pixel_values", "image_grid_thw")
    return [{key: batch[key].chunk(2)[side] for key in keys} for side in (0, 1)]


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_pairs_with_images(make, tmp_path, loss):
    rows = pair_rows(tmp_path)
    maker = make(loss, rows, holdout=rows[:3])
    check_image_scores(maker(ica={"k": 2}), pair_of, sides=2, normalize=True)
    check_gradients(maker, tmp_path, token_mean=False)
    check_all_weights_one(maker, tmp_path)


def test_kto_with_images(tmp_path):
    """LLaVA, since LLaMA-Factory 0.9.5 gives Qwen2-VL no positions in this stage, and fails by itself."""
    model = tiny_vision.save_llava(tmp_path / "llava")
    rows = [row | {"label": True} for row in tiny_vision.image_rows(tmp_path, 6)]
    maker = Maker(tmp_path, model, "kto", rows, holdout=rows[:3], template="llava")
    check_image_scores(maker(ica={"k": 2}, micro_batch=3), lines_of)


def test_rows_with_images(make, tmp_path):
    rows = tiny_vision.image_rows(tmp_path, 6)
    maker = make("sft", rows, holdout=rows[:3])
    check_image_scores(maker(ica={"k": 2}), lines_of)
    check_gradients(maker, tmp_path, token_mean=True)
    check_all_weights_one(maker, tmp_path)


def test_rows_with_videos(make, tmp_path):
    """A video is a list of pictures here; half of the rows have pictures too."""
    rows = tiny_vision.image_rows(tmp_path, 6)
    for i, row in enumerate(rows):
        text = row["messages"][0]["content"].replace("<image>", "")
        row["videos"] = [[row["images"][0]] * 2]
        row["images"] = row["images"][:1] if i % 2 else []
        row["messages"] = [{"role": "user", "content": "<image>" * len(row["images"]) + "<video>" + text}, row["messages"][1]]
    maker = make("sft", rows, holdout=rows[:3])
    check_image_scores(maker(ica={"k": 2}), lines_of)


def test_validate_agrees_with_the_run(tmp_path, qwen):
    rows = tiny_vision.image_rows(tmp_path, 6)
    write_data(tmp_path, "sft", rows, rows[:3])
    config = tmp_path / "config.yaml"
    keys = run_args(tmp_path, qwen, "sft", template="qwen2_vl") | {"ica": {"holdout": "good", "k": 2}}
    config.write_text(yaml.safe_dump(keys))
    found = validate(config)
    assert found["rows"] == 6 and found["usable as demonstrations"] == 3
    config.write_text(yaml.safe_dump(keys | {"packing": True}))
    with pytest.raises(ICAError, match="packed rows with images cannot be taken apart"):
        validate(config)


def test_sound_is_refused(make, tmp_path):
    trainer = make("sft", tiny.sft_rows(4))(ica=None)
    trainer.train_dataset = trainer.train_dataset.remove_columns("audios").add_column("audios", [["a.wav"]] * 4)
    with pytest.raises(ICAError, match="have `audios`"):
        attach(trainer, parse_config({"holdout": "good"}))
