"""LLaMA-Factory's own trainer classes, in this process."""

import json

import pytest

import tiny
from checks import (
    callback_of,
    check_accumulation,
    check_all_weights_one,
    check_gradients,
    check_kto_gradients,
    check_packed_gradients,
    check_scores,
    check_token_gradients,
    check_weights_stay_with_rows,
    write_weights,
)
from ica_plugin.config import parse_config
from ica_plugin.errors import ICAError
from ica_plugin.hosts.llamafactory.attach import refuse_unsupported
from ica_plugin.hosts.llamafactory.holdout import LOCATION_KEYS
from ica_plugin.hosts.llamafactory.launch import run_exp
from leaks import check_no_leak, entry_with_every_key
from llamafactory_harness import LORA, Maker, dataset_entry, kto_rows

ROWS = {
    "sft": lambda: tiny.sft_rows(8, turns=2),
    "sigmoid": lambda: tiny.pair_rows(8),
    "ipo": lambda: tiny.pair_rows(8),
    "hinge": lambda: tiny.pair_rows(8),
    "simpo": lambda: tiny.pair_rows(8),
    "orpo": lambda: tiny.pair_rows(8),
}


@pytest.fixture
def make(tmp_path, tiny_model):
    return lambda kind, rows=None, **settings: Maker(tmp_path, tiny_model, kind, rows or ROWS[kind](), **settings)


@pytest.mark.parametrize("kind", ROWS)
def test_gradients(make, tmp_path, kind):
    print(kind, check_gradients(make(kind), tmp_path, token_mean=kind == "sft"))


def test_gradients_of_lora(make, tmp_path):
    check_gradients(make("sft", **LORA), tmp_path, token_mean=True)


@pytest.mark.parametrize("kind", ["sigmoid", "simpo"])
def test_gradients_with_an_additive_sft_term(make, tmp_path, kind):
    check_gradients(make(kind, pref_ftx=0.7), tmp_path, token_mean=False)


def test_gradients_of_neat_packing(make, tmp_path):
    check_packed_gradients(make("sft"), tmp_path, bins=2, neat_packing=True)


def test_gradients_of_plain_packing(make, tmp_path):
    check_packed_gradients(make("sft"), tmp_path, bins=2, isolated=False, packing=True)


@pytest.mark.parametrize("settings", [{}, {"neat_packing": True}], ids=["plain", "neat-packing"])
def test_gradients_of_tokens(make, settings):
    check_token_gradients(make("sft"), micro_batch=2 if settings else 4, **settings)


def test_gradients_of_kto(make, tmp_path):
    def fields(batch):
        rows, kl = ((batch[f"{p}input_ids"], batch[f"{p}attention_mask"], batch[f"{p}labels"] != -100) for p in ("", "kl_"))
        return rows, kl, batch["kto_tags"]

    check_kto_gradients(make("kto", kto_rows(8)), tmp_path, fields)


@pytest.mark.parametrize("kind,settings", [("sft", {}), ("sft", {"neat_packing": True, "cutoff_len": 96}), ("sigmoid", {})])
def test_all_weights_one_is_the_hosts_own_run(make, tmp_path, kind, settings):
    rows = tiny.sft_rows(40) if settings else tiny.sft_rows(12) if kind == "sft" else tiny.pair_rows(12)
    maker = make(kind, rows, **settings)
    check_all_weights_one(maker, tmp_path)


@pytest.mark.parametrize("kind", ["sft", "sigmoid"])
def test_micro_batch_one_with_accumulation_four_equals_micro_batch_four(make, tmp_path, kind):
    rows = (tiny.sft_rows if kind == "sft" else tiny.pair_rows)(8, equal=True)
    check_accumulation(make(kind, rows, optim="sgd", learning_rate=0.05, max_grad_norm=1e9), tmp_path)


def labelled(row):
    return [(row["input_ids"], [label != -100 for label in row["labels"]])], row.get("kto_tags", True)


def labelled_pair(row):
    return [
        (row[f"{side}_input_ids"], [label != -100 for label in row[f"{side}_labels"]]) for side in ("chosen", "rejected")
    ], True


@pytest.mark.parametrize("kind", ROWS)
def test_scores(make, kind):
    trainer = make(kind, **{**LORA, "learning_rate": 0.05} if kind in ("sft", "sigmoid") else {})(ica={"k": 2})
    check_scores(trainer, labelled if kind == "sft" else labelled_pair)
    assert callback_of(trainer).scoring.length_normalize == (callback_of(trainer).train.kind == "pair")


def test_scores_of_kto(make):
    trainer = make("kto", kto_rows(8))(ica={"k": 2}, micro_batch=4)
    check_scores(trainer, labelled)
    callback = callback_of(trainer)
    assert {
        callback.holdout.examples[d].desirable for demos in callback.state.shown(range(len(callback.train))) for d in demos
    } == {True}


def test_scores_and_weights_stay_with_their_rows(make):
    """Reversed, packed both ways: each example keeps its own score and weight, by content."""
    rows = tiny.sft_rows(12, turns=2)
    straight = check_weights_stay_with_rows(make("sft", rows)(ica={}))
    others = [
        check_weights_stay_with_rows(make("sft", rows[::-1])(ica={})),
        check_weights_stay_with_rows(make("sft", rows, neat_packing=True)(ica={})),
        check_weights_stay_with_rows(make("sft", rows, packing=True, num_train_epochs=2)(ica={})),
    ]
    assert len(straight) == 12
    for other in others:
        assert other.keys() == straight.keys()
        for content, (score, weight) in straight.items():
            assert other[content] == (pytest.approx(score, abs=1e-3), pytest.approx(weight, rel=1e-3))


def test_preference_weights_stay_with_their_rows(make):
    rows = tiny.pair_rows(10)
    by_content = check_weights_stay_with_rows(make("sigmoid", rows)(ica={}))
    reversed_rows = check_weights_stay_with_rows(make("sigmoid", rows[::-1])(ica={}))
    assert by_content.keys() == reversed_rows.keys() and len(by_content) == 10
    for content, (score, weight) in by_content.items():
        assert reversed_rows[content] == (pytest.approx(score, abs=1e-3), pytest.approx(weight, rel=1e-3))


def holdout_tokens(trainer):
    return [example.demonstration.tokens.tolist() for example in callback_of(trainer).holdout.examples]


@pytest.mark.parametrize("kind", ["sft", "simpo", "kto"])
def test_the_holdout_is_a_name_a_path_or_an_entry(make, tmp_path, kind):
    rows = kto_rows(8) if kind == "kto" else None
    maker = make(kind, rows)
    path = tiny.write_jsonl(tmp_path / "elsewhere.jsonl", maker.holdout)
    named = holdout_tokens(maker(ica={"holdout": "good"}))
    assert len(named) == 6
    assert holdout_tokens(maker(ica={"holdout": str(path)})) == named
    assert holdout_tokens(maker(ica={"holdout": dataset_entry(kind, str(path))})) == named
    assert holdout_tokens(maker(ica={"holdout": {"file_name": str(path)}})) == named
    if kind == "sft":
        assert holdout_tokens(maker(ica={"holdout": "good"}, neat_packing=True)) == named


@pytest.mark.parametrize(
    "holdout,message",
    [
        ("god", "neither a dataset in .*dataset_info.json nor a file .*Did you mean `good`"),
        ("pairs.jsonl", "cannot read it as the run's data"),
        ("empty.jsonl", "ica.holdout: .*empty.jsonl"),
        ("broken.jsonl", "malformed json: .*broken.jsonl, line 2: Expecting value"),
        ("long.jsonl", "longer than cutoff_len"),
    ],
)
def test_a_wrong_holdout_says_what_to_do(make, tmp_path, holdout, message):
    tiny.write_jsonl(tmp_path / "pairs.jsonl", [{"question": "red", "answer": "blue"}])
    tiny.write_jsonl(tmp_path / "empty.jsonl", [])
    (tmp_path / "broken.jsonl").write_text('{"messages": []}\n{"messages": [\n')
    long = tiny.sft_rows(2)
    long[1]["messages"][1]["content"] = "red green blue " * 200
    tiny.write_jsonl(tmp_path / "long.jsonl", long)
    path = tmp_path / holdout
    with pytest.raises(ICAError, match=message):
        make("sft")(ica={"holdout": str(path) if path.exists() else holdout})


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"stage": "rm"}, "stage: rm is not supported.*ica-plugin select"),
        ({"do_train": False}, "do_train"),
        ({"stage": "dpo", "pref_loss": "kto_pair"}, "pref_loss: kto_pair couples"),
        ({"stage": "dpo", "pref_bco_weight": 0.5}, "BCO loss.*ica-plugin select"),
        ({"deepspeed": "zero2.json"}, "deepspeed is not supported yet.*ica-plugin select"),
        ({"use_ray": True}, "use_ray trains outside.*ica-plugin select"),
        ({"ica": {"weights": "w.parquet"}, "neat_packing": True}, "ica.weights.*neat_packing"),
        ({"ica": {"weights": "w.parquet"}, "val_size": 0.1}, "ica.weights.*val_size"),
        ({"ica": {"houldout": "good"}}, "did you mean `holdout`"),
        ({"ica": None}, "must be a block"),
    ],
)
def test_what_cannot_be_weighted_is_refused_before_a_model_is_loaded(settings, message):
    with pytest.raises(ICAError, match=message):
        run_exp({"stage": "sft", "do_train": True, "model_name_or_path": "nowhere", "ica": {"holdout": "good"}, **settings})


def test_weights_from_a_file_and_from_a_column(make, tmp_path):
    weights = [0.5 + i / 8 for i in range(8)]
    trainer = make("sft")(ica={"weights": str(write_weights(tmp_path / "w.parquet", weights))})
    assert callback_of(trainer).weights.tolist() == weights
    trainer.train()
    with pytest.raises(ICAError, match="no such column"):  # LLaMA-Factory drops every column it does not know
        make("sft")(ica={"weights": "quality"})


def test_a_home_is_expanded(make, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    maker = make("sft")
    path = tiny.write_jsonl(tmp_path / "elsewhere.jsonl", maker.holdout)
    expected = holdout_tokens(maker(ica={"holdout": str(path)}))
    assert holdout_tokens(maker(ica={"holdout": "~/elsewhere.jsonl"})) == expected
    assert holdout_tokens(maker(ica={"holdout": {"file_name": "~/elsewhere.jsonl"}})) == expected
    with pytest.raises(ICAError, match="ica.holdout: ~/nowhere.jsonl: no such file"):
        maker(ica={"holdout": {"file_name": "~/nowhere.jsonl"}})


def test_no_key_of_an_entry_leaks():
    from dataclasses import fields

    from llamafactory.data.parser import DatasetAttr

    keys = [field.name for field in fields(DatasetAttr)] + sorted(LOCATION_KEYS) + ["columns", "tags"]
    assert {"file_name", "hf_hub_url", "subset"} <= check_no_leak(entry_with_every_key(keys)).keys()


def test_rows_that_were_prepared_before_are_not_named_by_their_place(tmp_path):
    """`tokenized_path` makes LLaMA-Factory ignore what its config says of the data, and keeps nothing of what was said before."""
    args = {"do_train": True, "dataset": "train", "dataset_dir": str(tmp_path), "tokenized_path": str(tmp_path / "tokens")}
    given = parse_config({"weights": "w.parquet"})
    refuse_unsupported(args, given)  # it is written by this run
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "dataset_dict.json").write_text("{}")
    with pytest.raises(ICAError, match="prepared before.*Remove `tokenized_path`"):
        refuse_unsupported(args, given)
    refuse_unsupported(args, parse_config({"holdout": "good"}))


@pytest.mark.parametrize("names", ["train", "other, train", ["train"]])
def test_rows_that_num_samples_puts_elsewhere_are_not_named_by_their_place(tmp_path, names):
    """LLaMA-Factory permutes them even where it takes all."""

    args = {"do_train": True, "dataset": names, "dataset_dir": str(tmp_path)}
    for entry in ({"file_name": "train.jsonl"}, {"file_name": "train.jsonl", "num_samples": 16}):
        (tmp_path / "dataset_info.json").write_text(json.dumps({"train": entry}))
        refuse_unsupported(args, parse_config({"holdout": "good"}))
        given = parse_config({"weights": "w.parquet"})
        if "num_samples" not in entry:
            refuse_unsupported(args, given)
            continue
        with pytest.raises(ICAError, match="`num_samples: 16` of `train` in `dataset_info.json` puts rows elsewhere"):
            refuse_unsupported(args, given)
