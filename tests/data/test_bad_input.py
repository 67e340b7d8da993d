"""Each bad input of docs/bad-input.md: the message, or what the run does instead."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, T5Config, T5ForConditionalGeneration

import hosts.trl.trl_harness as trl_harness
import tiny
from checks import callback_of, record_training_weights
from ica_plugin import attach
from ica_plugin.config import parse_config
from ica_plugin.data.read import read_examples
from ica_plugin.errors import ICAError
from runs import ROWS, build, refreshes, run, tokenised

PAGE = Path(__file__).parents[2] / "docs" / "bad-input.md"


def holdout_file(folder: Path, *lines: str) -> dict:
    (folder / "holdout.jsonl").write_text("".join(line + "\n" for line in lines))
    return {"holdout": str(folder / "holdout.jsonl")}


def weights_file(folder: Path, *rows: str) -> dict:
    (folder / "weights.csv").write_text("\n".join(["row,weight", *rows]) + "\n")
    return {"weights": str(folder / "weights.csv")}


def all_but(row: int) -> list[str]:
    return [f"{i},1" for i in range(ROWS) if i != row]


def row(tokens: list[int], supervised: int = 3) -> dict:
    labels = [-100] * (len(tokens) - supervised) + tokens[len(tokens) - supervised :]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def sound() -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": ids, "input_features": torch.zeros(1, 3)}
    read_examples(Dataset.from_dict({"input_ids": [[1] * 4]}), lambda features: batch)


def conversational_without_template(folder: Path) -> None:
    trainer = trl_harness.Maker(folder, "sft", trl_harness.sft_rows(4))(ica=None)
    trainer.processing_class.chat_template = None
    chats = [{"prompt": r["messages"][:1], "completion": r["messages"][1:2]} for r in tiny.sft_rows(3)]
    attach(trainer, {"k": 2}, holdout=Dataset.from_list(chats))


def sharded(folder: Path, kind: DistributedType) -> None:
    trainer = build(folder, None)
    trainer.accelerator.state._shared_state["distributed_type"] = kind
    try:
        attach(trainer, {}, holdout=tokenised(6, 9))
    finally:
        trainer.accelerator.state._shared_state["distributed_type"] = DistributedType.NO


def masked(folder: Path):
    trainer = build(folder, None)
    tokenizer = tiny.make_tokenizer()
    tokenizer.mask_token = "red"
    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=True)
    attach(trainer, {}, holdout=tokenised(6, 9))


def encoder_decoder(folder: Path):
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, vocab_size=400, decoder_start_token_id=0)
    build(folder, {}, model=T5ForConditionalGeneration(config))


def data_parallel(folder: Path):
    trainer = build(folder, None)
    trainer.args._n_gpu = 2
    attach(trainer, {}, holdout=tokenised(6, 9))


def changing_collator(folder: Path):
    trainer = build(folder, None)
    host = trainer.data_collator
    trainer.data_collator = lambda rows: host([{**row, "input_ids": [t + len(rows) for t in row["input_ids"]]} for row in rows])
    attach(trainer, {"retrieval": "random"}, holdout=tokenised(6, 9))
    trainer.train()


GOOD = json.dumps(row([5, 6, 7, 8, 9]))
# What the page calls it → how to make it.
REFUSED: dict[str, Callable[[Path], object]] = {
    "malformed json": lambda f: attach(build(f, None), holdout_file(f, GOOD, '{"input_ids": [5, 6')),
    "wrong columns": lambda f: attach(build(f, None), holdout_file(f, '{"question": "red", "answer": "blue"}')),
    "missing file": lambda f: attach(build(f, None), {"holdout": "nowhere.jsonl"}),
    "empty file": lambda f: attach(build(f, None), holdout=Dataset.from_list([])),
    "every answer empty": lambda f: build(f, {}, holdout=Dataset.from_list([row([5, 6, 7], 0)])),
    "no train row with an answer": lambda f: build(f, {}, train=Dataset.from_list([row([5, 6, 7], 0)] * 3)),
    "holdout row over the context": lambda f: build(f, {}, holdout=Dataset.from_list([row([5] * 2000)])),
    "holdout row over `max_length` of TRL": lambda f: trl_harness.Maker(
        f, "sft", trl_harness.sft_rows(4), Dataset.from_list([row([5] * 200)]), max_length=64
    )(ica={}),
    "`with_transform`": lambda f: build(f, {}, train=tokenised(4, 0).with_transform(lambda rows: rows)),
    "a column `ica_rows`": lambda f: build(f, {}, train=tokenised(4, 0).add_column("ica_rows", [0, 1, 2, 3])),
    "a collator that changes rows": changing_collator,
    "`k: 0`": lambda f: parse_config({"holdout": "x", "k": 0}),
    "weights: missing row": lambda f: build(f, weights_file(f, *all_but(4))),
    "weights: duplicate row": lambda f: build(f, weights_file(f, "3,1", *all_but(-1))),
    "weights: negative": lambda f: build(f, weights_file(f, "4,-1", *all_but(4))),
    "weights: NaN": lambda f: build(f, weights_file(f, "4,nan", *all_but(4))),
    "weights: unknown row": lambda f: build(f, weights_file(f, "99,1", *all_but(-1))),
    "streaming or iterable dataset": lambda f: build(f, {}, train=tokenised(ROWS, 0).to_iterable_dataset(), max_steps=2),
    "FSDP": lambda f: sharded(f, DistributedType.FSDP),
    "DeepSpeed": lambda f: sharded(f, DistributedType.DEEPSPEED),
    "rows with sound": lambda f: sound(),
    "masked language modelling": lambda f: masked(f),
    "encoder-decoder": lambda f: encoder_decoder(f),
    "several GPUs in one process": lambda f: data_parallel(f),
    "no chat template": conversational_without_template,
}


def page() -> dict[str, tuple[str, str]]:
    """The table of the page: name → (what happens, message)."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| input")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {cell[0]: (cell[1], cell[2]) for cell in cells}


def test_the_page_lists_every_case():
    assert set(page()) == {*REFUSED, *GOES_ON}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    """The message holds the page's, in which `…` stands for what differs from run to run."""
    with pytest.raises(ICAError) as error:
        REFUSED[name](tmp_path)
    does, message = page()[name]
    assert does == "stops"
    pattern = ".*".join(re.escape(part) for part in message.strip("`").split("…"))
    assert re.search(pattern, str(error.value), flags=re.DOTALL), str(error.value)


def empty_answers(folder: Path):
    rows = [*tokenised(ROWS - 2, 0).to_list(), row([5, 6, 7], 0), row([8, 9, 10], 0)]
    trainer = run(folder, {}, train=Dataset.from_list(rows))
    weights = callback_of(trainer).weights
    assert weights[-2:].tolist() == [0, 0] and (weights[:-2] > 0).all()


def row_that_fills_the_context(folder: Path):
    long = row([5] * 1020)
    trainer = run(folder, {}, train=Dataset.from_list([*tokenised(5, 0).to_list(), long]), num_train_epochs=1)
    assert callback_of(trainer).state.shown([5])[0] == [] and callback_of(trainer).weights[5] == 1


def one_holdout_row(folder: Path):
    trainer = run(folder, {}, holdout=tokenised(1, 9))
    assert {tuple(demos) for demos in callback_of(trainer).state.shown(range(len(callback_of(trainer).train)))} == {(0,)}
    assert callback_of(trainer).weights.std() > 0


def one_train_row(folder: Path):
    trainer = run(folder, {}, train=tokenised(1, 0))
    assert callback_of(trainer).weights.tolist() == [1]


def equal_scores(folder: Path):
    trainer = run(folder, {}, train=Dataset.from_list(tokenised(1, 0).to_list() * 8))
    assert np.allclose(callback_of(trainer).weights, 1, atol=1e-4)


def row_in_both_sets(folder: Path):
    both = Dataset.from_list([*tokenised(3, 9).to_list(), tokenised(ROWS, 0)[4]])
    trainer = run(folder, {"k": 4}, holdout=both)
    demonstrations = callback_of(trainer).state.shown(range(len(callback_of(trainer).train)))
    assert sorted(demonstrations[4]) == [0, 1, 2] and sorted(demonstrations[5]) == [0, 1, 2, 3]


def max_steps_inside_a_window(folder: Path):
    trainer = run(folder, {"refresh_interval": 100}, max_steps=3)
    assert [(step, len(rows)) for step, rows in refreshes(folder)] == [(0, 12)] and trainer.state.global_step == 3


def sorting_collator(folder: Path):
    trainer = build(folder, None, num_train_epochs=1)
    host = trainer.data_collator
    trainer.data_collator = lambda rows: host(sorted(rows, key=lambda row: len(row["input_ids"])))
    attach(trainer, weights=[float(len(tokens)) for tokens in trainer.train_dataset["input_ids"]])
    seen = record_training_weights(trainer)
    trainer.train()
    assert len(seen) == ROWS and all(weight == len(tokens) for tokens, weight in seen)


def tokenised_without_template(folder: Path):
    trainer = build(folder, {})
    trainer.processing_class.chat_template = None
    trainer.train()
    assert trainer.state.global_step == 12


GOES_ON = {
    "empty answer": empty_answers,
    "train row that fills the context": row_that_fills_the_context,
    "holdout of one row": one_holdout_row,
    "one train row": one_train_row,
    "all scores equal": equal_scores,
    "row in both sets": row_in_both_sets,
    "`max_steps` inside a refresh window": max_steps_inside_a_window,
    "a collator that sorts rows": sorting_collator,
    "tokenised rows, no chat template": tokenised_without_template,
}


@pytest.mark.parametrize("name", GOES_ON)
def test_goes_on(tmp_path, name, capfd):
    GOES_ON[name](tmp_path)
    does, message = page()[name]
    assert does != "stops"
    said = capfd.readouterr().err
    pattern = ".*".join(re.escape(part) for part in message.strip("`").split("…"))
    assert message == "–" or re.search(pattern, said, flags=re.DOTALL), said
