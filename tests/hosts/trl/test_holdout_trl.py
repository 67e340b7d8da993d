"""A holdout row that TRL would cut to `max_length` is refused, as in the other hosts, and never shown in part."""

import pytest
import trl
from datasets import Dataset
from packaging.version import Version

from ica_plugin import ICAError, attach
from trl_harness import Maker, kto_rows, pair_rows, sft_rows

KINDS = {"sft": sft_rows, "dpo": pair_rows, "simpo": pair_rows, "orpo": pair_rows, "kto": kto_rows}


def lengthened(row: dict, key: str) -> dict:
    text = " red green blue" * 40
    value = row[key]
    return {**row, key: value + text if isinstance(value, str) else [{**value[0], "content": value[0]["content"] + text}]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["prompt", "answer"])
def test_a_holdout_row_over_max_length_is_refused(tmp_path, kind, part):
    make_rows = KINDS[kind]
    holdout = make_rows(4, seed=99)
    key = "prompt" if part == "prompt" else ("chosen" if "chosen" in holdout[0] else "completion")
    holdout[2] = lengthened(holdout[2], key)
    settings = {"max_length": 64} | (
        {"max_prompt_length": 40} if Version(trl.__version__) < Version("1.0") and kind != "sft" else {}
    )
    maker = Maker(tmp_path, kind, make_rows(8), holdout, **settings)
    with pytest.raises(ICAError, match=r"1 row\(s\) are longer than max_length \(64\), first row 2 with \d{3} tokens"):
        maker(ica={}, micro_batch=4)
    # What was lifted to see the row whole is back.
    trainer = maker(ica=None, micro_batch=4)
    before = dict(vars(trainer.data_collator))
    attach(trainer, {}, holdout=Dataset.from_list([holdout[0], holdout[1]]))
    assert trainer.args.max_length == 64 and vars(trainer.data_collator.collator) == before


def test_a_tokenised_row_over_max_length_is_refused_too(tmp_path):
    rows = Dataset.from_list([{"input_ids": [5] * 70, "labels": [5] * 70}])
    with pytest.raises(ICAError, match=r"longer than max_length \(64\)"):
        Maker(tmp_path, "sft", sft_rows(8), rows, max_length=64)(ica={})
