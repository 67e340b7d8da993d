"""Images of rows: what a forward takes of several lines, and what is noticed of a collator."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from ica_plugin.data.matching import places_of_rows
from ica_plugin.data.media import Media, joined_tensors
from ica_plugin.data.read import read_examples
from ica_plugin.data.store import Rows, Sequence
from ica_plugin.errors import ICAError
from ica_plugin.scorers.in_context import in_context


def media(**tensors) -> Media:
    """Media of one line, read as from a collated row."""
    row = {"input_ids": [1] * 4}
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "labels": torch.ones(1, 4), "attention_mask": torch.ones(1, 4)}
    [read] = read_examples(Dataset.from_list([row]), lambda features: {**batch, **tensors})
    return read.sequences[0].media[0][1]


def test_images_follow_each_other_line_by_line_and_are_padded():
    first, second = (torch.full((1, 3, size, 2), float(size)) for size in (4, 2))
    types = torch.tensor([[0, 1, 1, 0]])
    a = media(pixel_values=first, image_sizes=torch.tensor([[4, 2]]), mm_token_type_ids=types)
    b = media(pixel_values=second, image_sizes=torch.tensor([[2, 2]]), mm_token_type_ids=types)
    found = joined_tensors([((0, b), (4, a)), (), ((2, b),)], 8)
    assert found["image_sizes"].tolist() == [[2, 2], [4, 2], [2, 2]]
    assert found["pixel_values"].shape == (3, 3, 4, 2)
    assert torch.equal(found["pixel_values"][1], first[0]) and found["pixel_values"][0, :, 2:].abs().sum() == 0
    assert found["mm_token_type_ids"].tolist() == [[0, 1, 1, 0] * 2, [0] * 8, [0, 0, 0, 1, 1, 0, 0, 0]]
    assert joined_tensors([(), ()], 8) == {}


def test_images_that_are_padded_by_line_stand_on_one_line():
    """Idefics and its like: [lines, images, …] with a mask of pixels."""
    one, two = (torch.rand(1, n, 3, 4, 4) for n in (1, 2))
    a, b = (media(pixel_values=each, pixel_attention_mask=each[:, :, 0] > 0) for each in (one, two))
    found = joined_tensors([((0, b), (4, a)), ((0, a),)], 8)
    assert torch.equal(found["pixel_values"], torch.cat([two, one, one], dim=1))
    assert found["pixel_attention_mask"].shape == (1, 4, 4, 4)


def pixels_of(features: list[dict], key: str = "pixel_values") -> dict:
    ids = torch.tensor([row["input_ids"] for row in features])
    return {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones_like(ids),
        key: torch.tensor([row["shade"] for row in features]),
    }


ALIKE = Dataset.from_list([{"input_ids": [1, 2, 3], "shade": [shade, 0.0]} for shade in (0.1, 0.2, 0.1)])


def test_rows_that_differ_in_their_images_alone_are_two_rows():
    rows = read_examples(ALIKE, pixels_of)
    assert rows.has_media and rows[0].sequences[0].digest == rows[2].sequences[0].digest != rows[1].sequences[0].digest
    assert rows[[0, 1]].digest == Rows.of([rows[2], rows[1]]).digest != rows[[0, 2]].digest
    assert rows[1].sequences[0].media[0][1].tensors()["pixel_values"].tolist() == [pytest.approx([0.2, 0.0])]


def test_images_stand_behind_those_of_the_demonstrations():
    rows = read_examples(ALIKE, pixels_of)
    shown = in_context(rows[1].sequences[0], [rows[0].demonstration, rows[2].demonstration])
    assert [start for start, _ in shown.media] == [0, 3, 6] and shown.scored.tolist() == [False] * 7 + [True] * 2
    assert joined_tensors([shown.media], 9)["pixel_values"][:, 0].tolist() == pytest.approx([0.1, 0.1, 0.2])


def test_a_batch_in_another_order_is_refused_where_images_alone_tell_rows_apart():
    rows = [*read_examples(ALIKE, pixels_of)[[0, 1]]]
    other = replace(rows[0], sequences=(Sequence(np.array([4, 5, 6]), np.array([False, True, True])),))
    turned = {"input_ids": torch.tensor([[4, 5, 6], [1, 2, 3], [1, 2, 3]])}
    turned |= {"labels": turned["input_ids"], "attention_mask": torch.ones(3, 3)}
    assert places_of_rows(turned, [other, *rows]).tolist() == [0, 1, 2]
    with pytest.raises(ICAError, match="differ in their images alone"):
        places_of_rows(turned, [*rows, other])


def test_a_collator_that_changes_images_stops_the_run():
    shades = iter(range(100))
    rows = read_examples(ALIKE, lambda features: {**pixels_of(features), "pixel_values": torch.tensor([[float(next(shades))]])})
    with pytest.raises(ICAError, match="others than when it was read"):
        rows[0].sequences[0].media[0][1].tensors()


def test_empty_columns_of_media_say_that_the_images_are_the_collators_own():
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "shade": [0.1], "images": None, "videos": None}])
    assert not read_examples(rows, pixels_of).has_media


@pytest.mark.parametrize("key", ["input_features", "cross_attention_mask"])
def test_what_cannot_be_put_behind_demonstrations_is_refused_by_name(key):
    with pytest.raises(ICAError, match=f"row 0: its batch has `{key}`"):
        read_examples(ALIKE, lambda features: pixels_of(features, key))
