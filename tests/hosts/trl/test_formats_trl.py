"""Rows and holdouts in the forms that users have them in: formats, text that a collator tokenises, lists, frames, dicts."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

import tiny
from ica_plugin import ICAError, attach
from runs import ROWS, build, tokenised
from trl_harness import Maker, sft_rows

BLOCK = {"retrieval": "random", "k": 2, **tiny.NAMED}


def scores_of(callback) -> np.ndarray:
    callback.refresh(list(range(len(callback.train))), shared=True)
    return callback.scores.numpy()


def tensors(features: list[dict]) -> dict:
    """A collator of tensors and arrays, which lists break."""
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: pad_sequence([torch.as_tensor(row[key] + 0) for row in features], batch_first=True, padding_value=value)
        for key, value in padding.items()
    }


@pytest.mark.parametrize("form", ["numpy", "torch"])
@pytest.mark.parametrize("columns", [None, ["input_ids", "attention_mask", "labels"]], ids=["all", "some"])
def test_rows_as_tensors_with_a_holdout_of_lists(tmp_path, monkeypatch, form, columns):
    if find_spec("torchvision"):  # datasets 4.0 imports a name that newer ones have no more, whatever the columns
        monkeypatch.setattr("torchvision.io.VideoReader", object, raising=False)
    plain = build(tmp_path / "plain", None, max_steps=2)
    expected = scores_of(attach(plain, BLOCK, holdout=tokenised(6, 9)))
    train = tokenised(ROWS, 0).add_column("length", list(range(ROWS))).with_format(form, columns=columns)
    trainer = build(tmp_path / form, None, train=train, max_steps=2)
    trainer.data_collator = tensors
    callback = attach(trainer, BLOCK, holdout=tokenised(6, 9))
    np.testing.assert_allclose(scores_of(callback), expected, atol=1e-4)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_collator_that_tokenises_text(tmp_path):
    """The columns that reach the collator are text, so nothing but it knows the tokens."""
    tokenizer = tiny.make_tokenizer()

    def tokenise(features: list[dict]) -> dict:
        batch = tokenizer([row["text"] for row in features], return_tensors="pt", padding=True)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    texts = [row["prompt"] + row["completion"] for row in sft_rows(8)]
    trainer = Trainer(
        tiny.make_model(),
        TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none", remove_unused_columns=False
        ),
        train_dataset=Dataset.from_dict({"text": texts, "number": list(range(8))}),
        data_collator=tokenise,
    )
    callback = attach(trainer, BLOCK, holdout=Dataset.from_dict({"text": texts[:3]}))
    assert callback.train[3].sequences[0].tokens.tolist() == tokenizer(texts[3])["input_ids"]
    assert callback.holdout.rows_in_train == 3
    trainer.train()
    assert trainer.state.global_step == 2


ROWS_OF = {
    "a DataFrame": pd.DataFrame,
    "a list of rows": list,
    "a DatasetDict with a train split": lambda rows: DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1])),
    "a dict of one set": lambda rows: {"good": Dataset.from_list(rows)},
}


@pytest.mark.parametrize("form", ROWS_OF)
def test_a_holdout_in_the_forms_that_rows_come_in(tmp_path, form):
    maker = Maker(tmp_path, "sft", sft_rows(8))
    expected = attach(maker(ica=None), BLOCK, holdout=Dataset.from_list(maker.holdout)).holdout
    callback = attach(maker(ica=None), BLOCK, holdout=ROWS_OF[form](maker.holdout))
    assert len(callback.holdout.examples) == 6
    for one, other in zip(callback.holdout.examples, expected.examples, strict=True):
        assert one.demonstration.tokens.tolist() == other.demonstration.tokens.tolist()


def test_a_dict_of_datasets_is_named_sets(tmp_path):
    maker = Maker(tmp_path, "sft", sft_rows(8))
    rows = Dataset.from_list(maker.holdout)
    held = DatasetDict(maths=rows.select(range(2)), code=rows.select(range(2, 6)))
    callback = attach(maker(ica=None, max_steps=1), {**BLOCK, "k": 1}, holdout=held)
    assert callback.holdout.sets == {"maths": [0, 1], "code": [2, 3, 4, 5]}
    callback.trainer.train()
    assert set(callback.scoring.config.sets) == {"maths", "code"}


@pytest.mark.parametrize(
    "holdout, message",
    [
        (lambda rows: (row for row in rows), r"holdout: a generator can be read once alone.* `list"),
        (
            lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
            "holdout: an IterableDataset has no fixed rows.*`Dataset.from_list",
        ),
        (lambda rows: 7, "holdout: int is none of"),
        (lambda rows: [], "has no rows"),
        (lambda rows: ["red", "green"], "holdout: a list of str is none of"),
        (lambda rows: {}, "is empty; give a path"),
    ],
)
def test_other_holdouts_are_refused_by_what_they_are(tmp_path, holdout, message):
    maker = Maker(tmp_path, "sft", sft_rows(8))
    with pytest.raises(ICAError, match=message):
        attach(maker(ica=None), BLOCK, holdout=holdout(maker.holdout))


def test_weights_out_of_a_generator_are_refused(tmp_path):
    maker = Maker(tmp_path, "sft", sft_rows(8))
    with pytest.raises(ICAError, match="weights: a generator can be read once alone"):
        attach(maker(ica=None), weights=(1.0 for _ in range(8)))
    assert attach(maker(ica=None), weights=pd.Series(torch.arange(1.0, 9).numpy())).weights.tolist() == list(range(1, 9))
