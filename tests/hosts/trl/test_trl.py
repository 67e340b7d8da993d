"""transformers' and TRL's own trainer classes with `ica_plugin.attach`."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version

import ica_plugin
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
from ica_plugin import ICAConfig, ICAError, attach
from ica_plugin.data.read import read_examples
from trl_harness import Maker, kto_rows, pair_rows, sft_rows

TRL_1 = Version(trl.__version__) >= Version("1.0")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PACKING = {"packing": True, "packing_strategy": "bfd", "max_length": 96}
SFT_KINDS = ("sft", "transformers")
ROWS = {
    "transformers": lambda: sft_rows(8),
    "sft": lambda: sft_rows(8),
    "dpo": lambda: pair_rows(8),
    "ipo": lambda: pair_rows(8),
    "hinge": lambda: pair_rows(8),
    "simpo": lambda: pair_rows(8),
    # Its NLL term averages a batch over tokens: equal lengths make it a mean of rows.
    "orpo": lambda: pair_rows(8, equal=True),
}


@pytest.fixture
def make(tmp_path):
    return lambda kind, rows=None, **settings: Maker(tmp_path, kind, rows or ROWS[kind](), **settings)


@pytest.mark.parametrize("kind", ROWS)
def test_gradients(make, tmp_path, kind):
    print(kind, check_gradients(make(kind), tmp_path, token_mean=kind in SFT_KINDS))


@pytest.mark.parametrize("kind", ["transformers", "sft", "dpo", "simpo"])
def test_gradients_of_lora(make, tmp_path, kind):
    # For SFT with TRL's default loss: a fused one in TRL ≥ 1.9, exact here, since the output embedding is frozen.
    more = {"loss_type": None} if kind == "sft" and TRL_1 else {}
    lora = {**LORA, "init_lora_weights": False}
    check_gradients(make(kind, lora=lora, **more), tmp_path, token_mean=kind in SFT_KINDS)


def test_gradients_with_an_additive_nll_term(make, tmp_path):
    check_gradients(make("simpo", pair_rows(8, equal=True), cpo_alpha=0.7), tmp_path, token_mean=False)


@pytest.mark.parametrize("strategy", ["bfd", *(["bfd_split"] if TRL_1 else [])])
def test_gradients_of_packed_sft(make, tmp_path, strategy):
    check_packed_gradients(make("sft"), tmp_path, bins=2, **{**PACKING, "packing_strategy": strategy})


def test_gradients_of_padding_free_sft(make, tmp_path):
    check_gradients(make("sft", padding_free=True, max_length=None), tmp_path, token_mean=True)


@pytest.mark.parametrize(
    "settings", [{}, {"padding_free": True, "max_length": None}, PACKING], ids=["plain", "padding-free", "packed"]
)
def test_gradients_of_tokens(make, settings):
    check_token_gradients(make("sft"), micro_batch=2 if settings is PACKING else 4, **settings)


def test_gradients_of_kto(make, tmp_path):
    def fields(batch):
        if TRL_1:
            keys = ("input_ids", "attention_mask", "completion_mask")
            rows, kl = ([batch[prefix + key] for key in keys] for prefix in ("", "KL_"))
        else:
            rows, kl = (
                (
                    batch[prefix + "completion_input_ids"],
                    batch[prefix + "completion_attention_mask"],
                    batch[prefix + "completion_labels"] != -100,
                )
                for prefix in ("", "KL_")
            )
        return rows, kl, torch.as_tensor(batch["label"])

    check_kto_gradients(make("kto", kto_rows(8)), tmp_path, fields)


@pytest.mark.parametrize("kind", ["transformers", "sft", "dpo"])
def test_all_weights_one_is_the_hosts_own_run(make, tmp_path, kind):
    check_all_weights_one(make(kind, sft_rows(12) if kind in SFT_KINDS else pair_rows(12)), tmp_path)


def test_all_weights_one_is_the_hosts_own_packed_run(make, tmp_path):
    check_all_weights_one(make("sft", sft_rows(40), **PACKING), tmp_path)


@pytest.mark.parametrize("kind", ["transformers", "sft", "dpo"])
def test_micro_batch_one_with_accumulation_four_equals_micro_batch_four(make, tmp_path, kind):
    rows = (sft_rows if kind in SFT_KINDS else pair_rows)(8, equal=True)
    check_accumulation(make(kind, rows, optim="sgd", learning_rate=0.05, max_grad_norm=1e9), tmp_path)


def sequences_of(row):
    """The (chosen, rejected) sequences of a row in each trainer's own columns, and whether it is desirable."""
    if "labels" in row:
        return [(row["input_ids"], [label != -100 for label in row["labels"]])], True
    if "completion_mask" in row:
        return [(row["input_ids"], row["completion_mask"])], True
    if "chosen_labels" in row:
        sides = ("chosen", "rejected")
        return [(row[f"{s}_input_ids"], [label != -100 for label in row[f"{s}_labels"]]) for s in sides], True
    if "completion_labels" in row:
        return [(row["completion_input_ids"], [label != -100 for label in row["completion_labels"]])], row["label"]
    prompt = row.get("prompt_ids", row.get("prompt_input_ids"))
    responses = [
        row[key]
        for key in ("chosen_ids", "rejected_ids", "chosen_input_ids", "rejected_input_ids", "completion_ids")
        if key in row
    ]
    return [(prompt + r, [False] * len(prompt) + [True] * len(r)) for r in responses], row.get("label", True)


@pytest.mark.parametrize("kind", [*ROWS, "kto"])
def test_scores(make, kind):
    rows = kto_rows(8) if kind == "kto" else None
    lora = {"lora": LORA, "learning_rate": 0.05} if kind in ("sft", "dpo") else {}
    trainer = make(kind, rows, **lora)(ica={"k": 2}, micro_batch=4)
    check_scores(trainer, sequences_of)
    callback = callback_of(trainer)
    assert callback.scoring.length_normalize == (callback.train.kind == "pair")
    assert {
        callback.holdout.examples[d].desirable for demos in callback.state.shown(range(len(callback.train))) for d in demos
    } == {True}


def test_scores_and_weights_stay_with_their_rows(make):
    """Reversed, shuffled, packed and without padding: each example keeps its own score and weight, by content."""
    rows = sft_rows(12)
    straight = check_weights_stay_with_rows(make("sft", rows)(ica={}))
    others = [
        check_weights_stay_with_rows(make("sft", rows[::-1])(ica={}, num_train_epochs=2)),
        check_weights_stay_with_rows(make("sft", rows, **PACKING)(ica={})),
        check_weights_stay_with_rows(make("sft", rows, padding_free=True, max_length=None)(ica={})),
    ]
    assert len(straight) == 12
    for other in others:
        assert other.keys() == straight.keys()
        for content, (score, weight) in straight.items():
            assert other[content] == (pytest.approx(score, abs=1e-3), pytest.approx(weight, rel=1e-3))


@pytest.mark.parametrize("kind", ["transformers", "sft", "dpo", "simpo", "orpo", "kto"])
def test_the_holdout_is_a_path_or_raw_or_tokenised_rows(make, tmp_path, kind):
    maker = make(kind, kto_rows(8) if kind == "kto" else None)
    raw = Dataset.from_list(maker.holdout)
    path = tiny.write_jsonl(tmp_path / "holdout.jsonl", maker.holdout)
    # A trainer's own preparation of the same rows is the reference.
    maker.rows, rows = maker.holdout, maker.rows
    prepared = maker(ica=None, micro_batch=4).train_dataset
    maker.rows = rows
    prepared.save_to_disk(tmp_path / "saved")

    def shown(block, holdout):
        trainer = maker(ica=None, micro_batch=4)
        callback = attach(trainer, block, holdout=holdout)
        trainer.train()
        examples = callback.holdout.examples
        return [[(s.tokens.tolist(), s.scored.tolist()) for s in example.sequences] for example in examples]

    expected = shown({"k": 2}, prepared)
    assert len(expected) == 6
    assert shown({"k": 2}, str(tmp_path / "saved")) == expected
    assert shown({"holdout": str(tmp_path / "saved"), "k": 2}, None) == expected
    if kind == "transformers":  # a plain trainer holds no way to tokenise
        with pytest.raises(ICAError, match="give the holdout tokenised"):
            shown(None, raw)
        return
    for block, holdout in (({"k": 2}, raw), (None, str(path)), (None, path), (ICAConfig(holdout=str(path), k=1), None)):
        assert shown(block, holdout) == expected


def test_weights_are_an_array_or_a_file_or_a_column(make, tmp_path):
    weights = [0.5 + i / 8 for i in range(8)]
    path = write_weights(tmp_path / "w.parquet", weights)
    maker = make("sft", [{**row, "quality": weight} for row, weight in zip(sft_rows(8), weights, strict=True)])
    for block, given in (
        (None, torch.tensor(weights, requires_grad=True)),
        (None, np.array(weights)),
        (None, weights),
        (None, path),
        (None, "quality"),
        ({"weights": "quality"}, None),
        ({"weights": str(path)}, None),
    ):
        trainer = maker(ica=None, max_steps=1)
        callback = attach(trainer, block, weights=given)
        assert callback.weights.tolist() == weights
        trainer.train()
        assert (callback.files.folder / "run.json").is_file()
        table = pq.read_table(callback.files.folder / "scores.parquet")  # nothing scored; how often each row is drawn
        assert table["score"].null_count == 8 and table["weight"].to_pylist() == weights and sum(table["draws"].to_pylist()) > 0


def test_weights_that_count_the_rows_of_the_data_are_refused_where_trl_moves_them(make, tmp_path):
    """Packing puts rows into packs by their lengths; before, 18 of 20 rows got the weight of another row."""
    weights = np.arange(1.0, 13)
    (tmp_path / "w.csv").write_text("row,weight\n" + "".join(f"{row},{weight}\n" for row, weight in enumerate(weights)))
    for settings, why in ((PACKING, "packing=True"), *([({"shuffle_dataset": True}, "shuffle_dataset=True")] if TRL_1 else [])):
        maker = make("sft", sft_rows(12), **settings)
        if settings is PACKING:
            with pytest.raises(ICAError, match="no such column.*may have dropped it: `packing=True`"):
                attach(maker(ica=None), weights="quality")
        for given in (weights, tmp_path / "w.csv"):
            with pytest.raises(ICAError, match=f"they do not stand as in the data.*`{why}`"):
                attach(maker(ica=None), weights=given)


def test_a_column_of_weights_goes_where_its_row_goes(make):
    """TRL drops the rows that its limit leaves without a supervised token, and shuffles what is left."""
    rows = [{**row, "quality": 1.0 + i} for i, row in enumerate(sft_rows(12))]
    rows[3]["prompt"] = rows[3]["prompt"] * 30  # as long as `max_length` by itself
    maker = make("sft", rows, **({"shuffle_dataset": True} if TRL_1 else {}))
    trainer = maker(ica=None)
    with pytest.raises(ICAError, match="column"):
        attach(maker(ica=None), weights=[1.0] * 11)
    given = attach(trainer, weights="quality").weights.tolist()
    tokenizer = tiny.make_tokenizer()
    by_tokens = {tuple(tokenizer(row["prompt"] + row["completion"])["input_ids"]): row["quality"] for row in rows}
    found = [
        (by_tokens.get(tuple(tokens[:-1])), weight)
        for tokens, weight in zip(trainer.train_dataset["input_ids"], given, strict=True)
    ]
    assert len(found) == (11 if TRL_1 else 12)
    whole = [pair for pair in found if pair[0] is not None]
    assert len(whole) == 11 and all(quality == weight for quality, weight in whole)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_recipe_in_the_docs_picks_the_rows_that_it_scored_best(make, tmp_path, monkeypatch, kind):
    """TRL drops a row, and shuffles the others where it can: a row's number is not its place in the data."""
    rows = sft_rows(12) if kind == "sft" else pair_rows(12)
    for row in rows[2:4]:
        long = row["prompt"] if kind == "sft" else row["prompt"][0]["content"]
        row["prompt"] = long * 30 if kind == "sft" else [{"role": "user", "content": long * 30}]
    maker = make(kind, rows, **({"shuffle_dataset": True} if TRL_1 and kind == "sft" else {}))
    text = (Path(__file__).parents[3] / "docs" / "trl.md").read_text()
    recipe = next(block for block in re.findall("```python\n(.*?)```", text, re.S) if "best" in block)
    assert "[:1000]" in recipe
    trainers = []

    def build(model, args, train_dataset):
        maker.rows = train_dataset.to_list()
        trainers.append(maker(ica=None, max_steps=1))
        return trainers[-1]

    tiny.write_jsonl(tmp_path / "holdout.jsonl", maker.holdout)
    monkeypatch.chdir(tmp_path)
    known = {"dataset": Dataset.from_list(rows), "model": None, "args": None, "ica_plugin": ica_plugin, "torch": torch}
    exec(recipe.replace("[:1000]", "[:4]"), known | {"SFTTrainer": build})
    scored, chosen = trainers[0], trainers[1]
    if TRL_1:
        assert len(scored.train_dataset) == 10
    callback = callback_of(scored)
    best = callback.scores.nan_to_num(-torch.inf).argsort(descending=True)[:4].tolist()
    tokens = [callback.train[row].demonstration.tokens.tolist() for row in best]
    again = read_examples(chosen.train_dataset, chosen.data_collator)
    assert sorted(example.demonstration.tokens.tolist() for example in again) == sorted(tokens)


@pytest.mark.parametrize(
    "kind,settings,arguments,message",
    [
        ("sft", {}, {}, "`holdout` is required"),
        ("sft", {}, {"config": {"holdout": "a"}, "holdout": "b"}, "given twice"),
        ("sft", {}, {"config": {"kk": 3}, "holdout": "b"}, "did you mean `k`"),
        ("sft", {}, {"holdout": "nowhere.jsonl"}, "no such file"),
        ("sft", {}, {"holdout": Dataset.from_list([])}, "no rows"),
        ("sft", {}, {"holdout": Dataset.from_list([{"question": "red"}])}, "could not be prepared"),
        ("sft", {}, {"weights": [1.0, 2.0]}, "one weight per row"),
        ("sft", {}, {"weights": [1.0] * 7 + [float("nan")]}, "NaN"),
        ("sft", {}, {"weights": "quality"}, "no such column"),
        ("sft", {}, {"weights": "nowhere.csv"}, "no such file"),
        ("sft", {"packing": True, "packing_strategy": "wrapped", "max_length": 64}, {"weights": [1.0] * 8}, "bfd"),
        ("dpo", {"loss_type": "aot"}, {"weights": [1.0] * 8}, "`aot` couples the rows"),
        ("dpo", {}, {"holdout": Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])}, "holdout"),
    ],
)
def test_wrong_calls_say_what_to_do(make, kind, settings, arguments, message):
    with pytest.raises(ICAError, match=message):
        attach(make(kind, **settings)(ica=None), **arguments)


@pytest.mark.skipif(not TRL_1, reason="TRL 0.24 has no fused default loss")
def test_the_fused_default_loss_of_a_trained_output_embedding_is_refused(make):
    with pytest.raises(ICAError, match="loss_type='nll'"):
        attach(make("sft", loss_type=None)(ica=None), weights=[1.0] * 8)


def test_a_second_attach_is_refused(make):
    trainer = make("sft")(ica={})
    with pytest.raises(ICAError, match="attached to this trainer already"):
        attach(trainer, weights=[1.0] * 8)


def test_the_reference_is_the_one_of_the_trainer_s_own_loss(tmp_path):
    """A DPOTrainer given a trained adapter: against TRL's copy of it `irm` is 0 before the first step (TRL 0.24: adapters off)."""
    from peft import LoraConfig, get_peft_model

    from ica_plugin.policy.reference import reference_of

    class Trained(Maker):
        def _trl(self, model, arguments):
            torch.manual_seed(0)
            policy = get_peft_model(model, LoraConfig(**{**LORA, "init_lora_weights": False}))
            policy.warnings_issued = {}
            return trl.DPOTrainer(
                policy,
                args=trl.DPOConfig(**arguments, beta=0.5, max_length=256),
                train_dataset=Dataset.from_list(self.rows),
                processing_class=tiny.make_tokenizer(),
            )

    trainer = Trained(tmp_path, "dpo", pair_rows(8))(ica={"score": "irm"})
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(8)]))
    batch.pop("ica_rows", None)
    trainer.model.eval()
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, batch))
    callback = callback_of(trainer)
    irm = callback.scoring.score(list(range(8)), [[]] * 8)["irm"]
    assert loss == pytest.approx(float(np.mean(np.log1p(np.exp(-irm)))), abs=1e-4)  # the DPO loss is −log σ of the margin
    if "ref" in trainer.model.peft_config:
        assert reference_of(trainer).adapter == "ref" and (irm == 0).all()
    else:
        assert not TRL_1 and np.abs(irm).max() > 1e-3


def test_an_explicit_reference_model_is_taken(tmp_path):
    class Explicit(Maker):
        def _trl(self, model, arguments):
            other = tiny.make_model(seed=3)
            other.warnings_issued = {}
            return trl.DPOTrainer(
                model,
                ref_model=other,
                args=trl.DPOConfig(**arguments, beta=0.5, max_length=256),
                train_dataset=Dataset.from_list(self.rows),
                processing_class=tiny.make_tokenizer(),
            )

    trainer = Explicit(tmp_path, "dpo", pair_rows(8))(ica={"score": "irm"})
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(8)]))
    batch.pop("ica_rows", None)
    trainer.model.eval()
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, batch))
    irm = callback_of(trainer).scoring.score(list(range(8)), [[]] * 8)["irm"]
    assert loss == pytest.approx(float(np.mean(np.log1p(np.exp(-irm)))), abs=1e-4) and np.std(irm) > 0.01
