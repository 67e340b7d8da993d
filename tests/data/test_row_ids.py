"""Which train row is where in a batch, by the tokens of the collator's batch."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq

from checks import callback_of, record_training_weights
from ica_plugin import attach
from ica_plugin.data.read import read_examples
from ica_plugin.data.row_ids import NO_ROW, ROW_IDS, RowIdCollator, digest_of_ids, row_ids_of
from ica_plugin.data.store import Example, Rows, Sequence
from ica_plugin.errors import ICAError
from runs import build, tokenised

ROWS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
STORED = Rows.of(Example((Sequence(np.array(tokens), np.array(tokens) > 5),), "sft") for tokens in ROWS)
FEATURES = [[{"input_ids": ROWS[0], ROW_IDS: 0}, {"input_ids": ROWS[1], ROW_IDS: 1}], [{"input_ids": ROWS[2], ROW_IDS: 2}]]


def packing(side: str, order=lambda tokens: tokens):
    """A collator of bins as Axolotl's: the rows of a bin one after the other, padded to 8 on one side."""

    def collate(bins):
        lines = [np.concatenate([order(row["input_ids"]) for row in rows]) for rows in bins]
        pads = [np.zeros(8 - len(line), int) for line in lines]
        joined = [[line, pad] if side == "right" else [pad, line] for line, pad in zip(lines, pads, strict=True)]
        return {"input_ids": torch.tensor(np.stack([np.concatenate(parts) for parts in joined]))}

    return collate


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_rows_are_found_with_padding_on_either_side(side):
    batch = RowIdCollator(packing(side), STORED)(FEATURES)
    expected = [[0, 0, 0, 1, 1], [2, 2, 2, 2]]
    for line, ids in zip(batch[ROW_IDS].tolist(), expected, strict=True):
        padding = [NO_ROW] * (8 - len(ids))
        assert line == (ids + padding if side == "right" else padding + ids)


def test_rows_that_a_collator_moved_are_refused():
    with pytest.raises(ICAError, match="does not hold its rows one after the other"):
        RowIdCollator(packing("right", order=lambda tokens: tokens[::-1]), STORED)(FEATURES)


# A collator for each layout of a batch: the rows in the order `order`, each line cut by `cut`.


def padded(lines, cut, side="right"):
    lines = [(cut(np.array(tokens)), cut(np.array(scored))) for tokens, scored in lines]
    tokens, scored, real = (
        [torch.tensor(line) for line in column] for column in (*zip(*lines), [[1] * len(t) for t, _ in lines])
    )
    tokens, scored, real = (pad_sequence(column, batch_first=True, padding_side=side) for column in (tokens, scored, real))
    return {"input_ids": tokens, "attention_mask": real, "labels": torch.where(scored > 0, tokens, -100)}


def sft(rows, cut, **settings):
    return padded([(row["input_ids"], row["scored"]) for row in rows], cut, **settings)


def without_mask(rows, cut):
    batch = sft(rows, cut)
    del batch["attention_mask"]
    return batch


def kto(rows, cut):
    batch = sft(rows, cut)
    batch["completion_mask"] = (batch.pop("labels") != -100).long()
    around = sft(rows[1:] + rows[:1], cut)  # KTO's mismatched rows, of which none is weighted
    kl = {f"KL_{key}": around[key] for key in ("input_ids", "attention_mask")}
    return {**batch, **kl, "label": torch.tensor([row["label"] for row in rows])}


def sides(rows, side):
    return [(row["input_ids"] + row[side], row["scored"] + [1] * len(row[side])) for row in rows]


def pair(rows, cut):
    return padded(sides(rows, "chosen") + sides(rows, "rejected"), cut)


def interleaved(rows, cut):
    return padded([side for row in rows for side in (*sides([row], "chosen"), *sides([row], "rejected"))], cut)


def rejected_first(rows, cut):
    return padded(sides(rows, "rejected") + sides(rows, "chosen"), cut)


def cpo(rows, cut):
    batches = {side: padded(sides(rows, side), cut) for side in ("chosen", "rejected")}
    return {f"{side}_{key}": value for side, batch in batches.items() for key, value in batch.items()}


def old_dpo(rows, cut):
    """TRL 0.x: the prompt is padded on the left, in a tensor of its own."""
    prompt = sft(rows, cut, side="left")
    parts = {side: padded([(row[side], [1] * len(row[side])) for row in rows], cut) for side in ("chosen", "rejected")} | {
        "prompt": prompt
    }
    return {f"{part}_{key}": batch[key] for part, batch in parts.items() for key in ("input_ids", "attention_mask")}


LAYOUTS = [sft, without_mask, kto, pair, interleaved, rejected_first, cpo, old_dpo]
BY_LINE = {"interleaved": [0, 0, 1, 1, 2, 2, 3, 3]}  # others are read as chosen then rejected


def features(seed: int = 0) -> list[dict]:
    """Four rows that all begin alike, as chats do."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, length in enumerate([4, 9, 6, 5]):
        tokens = [1, 2, *rng.integers(10, 500, length).tolist()]
        rows.append(
            {
                "input_ids": tokens,
                "scored": [0, 0, 0] + [1] * (length - 1),
                "chosen": rng.integers(10, 500, 3 + i).tolist(),
                "rejected": rng.integers(10, 500, 6 - i).tolist(),
                "label": i % 2 == 0,
                ROW_IDS: i,
            }
        )
    return rows


def whole(line):
    return line


def collate(layout, order=(0, 1, 2, 3), cut=whole):
    def collator(rows):
        return layout([rows[i] for i in order] if len(rows) > 1 else rows, cut if len(rows) > 1 else whole)

    return collator


def ids(layout, rows=None, **settings) -> list[int]:
    rows = rows or features()
    store = read_examples([{k: v for k, v in row.items() if k != ROW_IDS} for row in rows], collate(layout))
    return RowIdCollator(collate(layout, **settings), store)(rows)[ROW_IDS].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 1, 2), (1, 0, 3, 2)])
def test_ids_follow_the_rows_wherever_the_collator_puts_them(layout, order):
    expected = [order[i] for i in BY_LINE.get(layout.__name__, range(4))]
    assert ids(layout, order=order) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_are_cut_at_an_end_are_known(layout):
    at_start, at_end = (lambda line: line[: max(len(line) - 1, 3)]), (lambda line: line[1:] if len(line) > 4 else line)
    expected = BY_LINE.get(layout.__name__, [0, 1, 2, 3])
    if layout not in (old_dpo,):  # whose parts would be cut inside the row
        assert ids(layout, cut=at_start) == expected
        assert ids(layout, cut=at_start, order=(2, 0, 1, 3)) == [(2, 0, 1, 3)[i] for i in expected]
    if layout not in (without_mask, old_dpo):
        assert ids(layout, cut=at_end) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "cut", [lambda line: line[::-1].copy(), lambda line: line[1:-1], lambda line: line + 1], ids=["reversed", "inside", "changed"]
)
def test_what_cannot_be_told_is_refused(layout, cut):
    with pytest.raises(ICAError, match="weights cannot be matched to rows"):
        ids(layout, cut=cut)


def test_rows_cut_to_what_they_share_are_refused_when_they_are_moved_unequally():
    def uneven(rows, cut):
        return padded([(row["input_ids"][: 2 + i], row["scored"][: 2 + i]) for i, row in enumerate(rows)], cut)

    rows = features()
    store = read_examples([{k: v for k, v in row.items() if k != ROW_IDS} for row in rows], collate(sft))
    assert RowIdCollator(collate(uneven), store)(rows)[ROW_IDS].tolist() == [0, 1, 2, 3]
    with pytest.raises(ICAError, match="cannot be matched"):
        RowIdCollator(collate(uneven, order=(3, 1, 0, 2)), store)(rows)


def test_repeated_and_dropped_rows_are_refused():
    for order in ((0, 0, 1, 2), (1, 1, 3, 3)):
        with pytest.raises(ICAError, match="cannot be matched"):
            ids(sft, order=order)


def test_equal_rows_may_stand_for_each_other():
    rows = features()
    rows[2] = {**copy.deepcopy(rows[0]), ROW_IDS: 2}
    assert sorted(ids(sft, rows, order=(2, 3, 0, 1))) == [0, 1, 2, 3]
    assert ids(sft, rows) == [0, 1, 2, 3]


def test_text_that_the_collator_tokenises_itself():
    texts = ["a red moon", "seven apples", "sail", "home under a quiet moon"]

    def collator(rows, order=(2, 0, 3, 1)):
        rows = [rows[i] for i in order] if len(rows) > 1 else rows
        return padded([([1, *row["text"].encode()], [0] + [1] * len(row["text"])) for row in rows], whole)

    rows = [{"text": text, ROW_IDS: i} for i, text in enumerate(texts)]
    store = read_examples([{"text": text} for text in texts], collator)
    assert RowIdCollator(collator, store)(rows)[ROW_IDS].tolist() == [2, 0, 3, 1]


class Sorting(DataCollatorForSeq2Seq):
    """Longest row first, as collators for varying lengths do."""

    def __call__(self, features, return_tensors=None):
        return super().__call__(sorted(features, key=lambda row: -len(row["input_ids"])), return_tensors)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collator_that_sorts_swaps_no_weights(tmp_path, workers):
    """Every row's weight is its own length, and it is trained with that weight, also in the processes of a data loader."""
    train = tokenised(12, 0)
    trainer = build(tmp_path, None, train=train, num_train_epochs=1, dataloader_num_workers=workers)
    trainer.data_collator = Sorting(trainer.processing_class)
    attach(trainer, weights=[float(len(row)) for row in train["input_ids"]])
    seen = record_training_weights(trainer)
    trainer.train()
    assert len(seen) == 12 and len({weight for _, weight in seen}) > 3
    assert all(weight == len(tokens) for tokens, weight in seen)
    assert len(callback_of(trainer).weights) == 12


def test_a_column_with_the_name_of_the_plugin_s_own_is_refused(tmp_path):
    trainer = build(tmp_path, None, train=tokenised(4, 0).add_column(ROW_IDS, [3, 2, 1, 0]))
    with pytest.raises(ICAError, match="has a column `ica_rows`.*Rename or remove it"):
        attach(trainer, weights=[1.0] * 4)


@pytest.mark.parametrize("of", ["train", "holdout"])
def test_a_dataset_with_a_transform_is_refused(tmp_path, of):
    def again(rows):
        return {key: rows[key] for key in ("input_ids", "attention_mask", "labels")}

    given = {"train": tokenised(4, 0), "holdout": tokenised(3, 9)}
    given[of] = given[of].with_transform(again)
    with pytest.raises(ICAError, match=f"{of}.* makes its rows anew whenever they are read .`with_transform`"):
        attach(build(tmp_path, None, train=given["train"]), holdout=given["holdout"])


def test_ids_have_a_digest():
    plain = row_ids_of(tokenised(5, 0))
    packed = Dataset.from_list(
        [{"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]}, {"input_ids": [4, 5], "position_ids": [0, 1]}]
    )
    seen = [
        digest_of_ids(ids) for ids in (plain, row_ids_of(tokenised(5, 1)), plain[:4], row_ids_of(packed), [[0, 0, 1], [1, 2]])
    ]
    assert seen[0] == seen[1] and len(set(seen)) == 4
