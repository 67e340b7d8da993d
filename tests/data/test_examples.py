import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ica_plugin.data.batches import examples_from_batch
from ica_plugin.data.read import read_examples
from ica_plugin.errors import ICAError

T = torch.tensor


def plain(example):
    return [(s.tokens.tolist(), s.scored.tolist()) for s in example.sequences]


def test_multi_turn_sft_rows_without_their_padding():
    batch = {
        "input_ids": T([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]),
        "attention_mask": T([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "labels": T([[-100, 6, -100, 8, 9], [-100, 6, -100, -100, -100]]),
    }
    long, short = examples_from_batch(batch, 2)
    assert plain(long) == [([5, 6, 7, 8, 9], [False, True, False, True, True])]
    assert plain(short) == [([5, 6], [False, True])]
    assert (long.kind, long.supervised_tokens, long.longest) == ("sft", 3, 5)


def test_left_padding():
    batch = {"input_ids": T([[0, 0, 5, 6]]), "attention_mask": T([[0, 0, 1, 1]]), "labels": T([[-100, -100, -100, 6]])}
    assert plain(examples_from_batch(batch, 1)[0]) == [([5, 6], [False, True])]


def test_the_first_token_is_never_scored():
    batch = {"input_ids": T([[5, 6]]), "attention_mask": T([[1, 1]]), "labels": T([[5, 6]])}
    assert plain(examples_from_batch(batch, 1)[0]) == [([5, 6], [False, True])]


def test_dpo_rows_are_cut_as_the_collator_cuts_them():
    rows = Dataset.from_list([{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "prompt": "text"}])
    (whole,) = read_examples(rows, DataCollatorForPreference(pad_token_id=0))
    assert plain(whole) == [([1, 2, 3, 4, 5], [False] * 3 + [True] * 2), ([1, 2, 3, 6], [False] * 3 + [True])]
    assert whole.kind == "pair" and whole.demonstration.prompt.tolist() == [1, 2, 3]
    (cut,) = read_examples(rows, DataCollatorForPreference(pad_token_id=0, max_length=4))
    assert plain(cut)[0] == ([1, 2, 3, 4], [False] * 3 + [True])


def test_cpo_and_orpo_rows():
    batch = {
        "chosen_input_ids": T([[1, 2, 3, 4]]),
        "chosen_attention_mask": T([[1, 1, 1, 1]]),
        "chosen_labels": T([[-100, -100, 3, 4]]),
        "rejected_input_ids": T([[1, 2, 5, 0]]),
        "rejected_attention_mask": T([[1, 1, 1, 0]]),
        "rejected_labels": T([[-100, -100, 5, -100]]),
        "prompt_input_ids": T([[1, 2]]),
        "prompt_attention_mask": T([[1, 1]]),
    }
    assert plain(examples_from_batch(batch, 1)[0]) == [
        ([1, 2, 3, 4], [False, False, True, True]),
        ([1, 2, 5], [False, False, True]),
    ]


def test_kto_rows_know_whether_they_are_desirable():
    batch = {
        "input_ids": T([[1, 2], [1, 3]]),
        "attention_mask": T([[1, 1], [1, 1]]),
        "completion_mask": T([[0, 1], [0, 1]]),
        "label": T([True, False]),
        "KL_input_ids": T([[1, 3], [1, 2]]),
    }
    good, bad = examples_from_batch(batch, 2)
    assert (good.kind, good.desirable, bad.desirable) == ("unpaired", True, False)


def test_twice_the_rows_are_chosen_then_rejected():
    batch = {
        "input_ids": T([[1, 2], [3, 4], [1, 5], [3, 6]]),
        "attention_mask": torch.ones(4, 2),
        "labels": T([[-100, 2], [-100, 4], [-100, 5], [-100, 6]]),
    }
    pairs = examples_from_batch(batch, 2)
    assert [e.kind for e in pairs] == ["pair", "pair"]
    assert [s.tokens.tolist() for s in pairs[1].sequences] == [[3, 4], [3, 6]]


def test_rows_are_read_through_the_collator_and_named_in_errors(tokenizer):
    rows = Dataset.from_list(
        [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7], "text": "never collated"}] * 2
    )
    assert len(read_examples(rows, DataCollatorForSeq2Seq(tokenizer))) == 2
    with pytest.raises(ICAError, match="row 0: the trainer's batches have a layout ica_plugin does not know"):
        read_examples(rows, lambda features: {"tokens": T([[1]])})


def test_equal_rows_have_equal_digests():
    batch = {"input_ids": T([[1, 2], [1, 2], [1, 3]]), "attention_mask": torch.ones(3, 2), "labels": T([[-100, 2]] * 3)}
    first, second, third = examples_from_batch(batch, 3)
    assert first.sequences[0].digest == second.sequences[0].digest != third.sequences[0].digest
