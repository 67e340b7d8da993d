"""Axolotl's own trainer classes, in this process: gradients, all weights 1, scores, and weights by content."""

import numpy as np
import pytest
import torch

import tiny
from checks import (
    callback_of,
    check_accumulation,
    check_all_weights_one,
    check_gradients,
    check_scores,
    check_token_gradients,
    check_weights_stay_with_rows,
)
from ica_plugin.errors import ICAError
from ica_plugin.tools.select import Choice, select_rows
from ica_plugin.weighting.weights import weights_from_scores

ROWS = {
    "sft": lambda: tiny.sft_rows(8, turns=2),
    "dpo": lambda: tiny.pair_rows(8),
    "ipo": lambda: tiny.pair_rows(8),
    # The NLL term of these two averages a batch over tokens: equal lengths make it a mean of rows.
    "simpo": lambda: tiny.pair_rows(8, equal=True),
    "orpo": lambda: tiny.argilla_rows(8, equal=True),
}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
}


@pytest.mark.parametrize("kind", ROWS)
def test_gradients(maker, tmp_path, kind):
    check_gradients(maker(kind, ROWS[kind]()), tmp_path, token_mean=kind == "sft")


def test_gradients_of_a_frozen_output_embedding_and_lora(maker, tmp_path):
    make = maker("sft", ROWS["sft"](), **LORA)
    check_gradients(make, tmp_path, token_mean=True)


def test_gradients_of_packed_sft(maker, tmp_path):
    # position_ids tell the packed rows apart, so the packed loss is the token mean of the single rows.
    make = maker("sft", tiny.sft_rows(16, turns=2), sample_packing=True, sample_packing_drop_attention_mask=True)
    check_gradients(make, tmp_path, token_mean=True, packed=True)


def test_gradients_of_tokens(maker):
    check_token_gradients(maker("sft", ROWS["sft"]()))
    packed = maker("sft", tiny.sft_rows(16, turns=2), sample_packing=True, sample_packing_drop_attention_mask=True)
    check_token_gradients(packed, micro_batch=1, drop=("length", "attention_mask"))


def test_gradients_of_kto(maker, tmp_path):
    """KTO's KL estimate is a constant of the batch, so its single-row losses are written out here."""
    make = maker("kto", tiny.kto_rows(8), rl_beta=0.5)
    weights = np.random.default_rng(0).uniform(0.1, 3, 8)
    import checks

    plain = make(ica=None, micro_batch=4)
    weighted = make(ica={"weights": str(checks.write_weights(tmp_path / "w.parquet", weights))}, micro_batch=4)
    weighted.model.load_state_dict(plain.model.state_dict())
    for trainer in (plain, weighted):  # a worse reference model, so that the KL estimate is not 0
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in trainer.ref_model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    checks.start_training(weighted)
    batch = weighted.data_collator(checks.features_of(weighted, [0, 1, 2, 3]))
    found = checks.gradients(weighted, weighted.compute_loss(weighted.model, dict(batch)))

    def logprob(model, ids, attention, mask):
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
        return (logits.gather(2, ids[:, 1:, None]).squeeze(2) * mask[:, 1:]).sum(1)

    policy, reference = plain.model, plain.ref_model
    one = [batch[k] for k in ("input_ids", "attention_mask", "completion_mask")]
    kl = [batch["KL_" + k] for k in ("input_ids", "attention_mask", "completion_mask")]
    with torch.no_grad():
        baseline = (logprob(policy, *kl) - logprob(reference, *kl)).mean().clamp(min=0)
        assert baseline > 0
        base = logprob(reference, *one)
    ratio = logprob(policy, *one) - base
    good = batch["label"].bool()
    losses = 1 - torch.sigmoid(plain.beta * torch.where(good, ratio - baseline, baseline - ratio))
    expected = checks.gradients(plain, (losses * torch.from_numpy(weights[:4]).float()).mean())
    assert checks.relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("kind", ["sft", "dpo", "simpo"])
def test_micro_batch_one_with_accumulation_four_equals_micro_batch_four(maker, tmp_path, kind):
    rows = {"sft": tiny.sft_rows, "dpo": tiny.pair_rows, "simpo": tiny.pair_rows}[kind](8, equal=True)
    check_accumulation(maker(kind, rows, optimizer="sgd", learning_rate=0.05, max_grad_norm=1e9), tmp_path)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_all_weights_one_is_the_hosts_own_run(maker, tmp_path, kind):
    rows = tiny.sft_rows(12, turns=2) if kind == "sft" else tiny.pair_rows(12)
    check_all_weights_one(maker(kind, rows), tmp_path)


def test_all_weights_one_in_4_bit(maker, model_for_4_bit, tmp_path):
    """Scoring must not touch the quantised weights: bitsandbytes would repack them for good at an inference forward."""
    rows = tiny.sft_rows(12, turns=2)
    check_all_weights_one(maker("sft", rows, model=model_for_4_bit, **{**LORA, "adapter": "qlora"}, load_in_4bit=True), tmp_path)


def test_scores_of_multi_turn_sft_with_trained_lora(maker):
    trainer = maker("sft", tiny.sft_rows(8, turns=2), **{**LORA, "learning_rate": 0.05})(ica={"k": 2})
    scores = check_scores(trainer, lambda row: ([(row["input_ids"], [label != -100 for label in row["labels"]])], True))
    assert any(float(p.abs().max()) > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)
    # More than one supervised turn in a row.
    labels = np.array(trainer.train_dataset[1]["labels"]) != -100
    assert (np.diff(labels.astype(int)) == 1).sum() >= 2
    assert len(scores) == 8


def pair_of(row):
    prompt = row["prompt_ids"]
    return [
        (prompt + row[f"{side}_ids"], [False] * len(prompt) + [True] * len(row[f"{side}_ids"])) for side in ("chosen", "rejected")
    ], True


def labelled_pair(row):
    return [
        (row[f"{side}_input_ids"], [label != -100 for label in row[f"{side}_labels"]]) for side in ("chosen", "rejected")
    ], True


def test_scores_of_dpo_pairs_with_trained_lora(maker):
    trainer = maker("dpo", tiny.pair_rows(8), **{**LORA, "learning_rate": 0.05})(ica={"k": 2})
    check_scores(trainer, pair_of)
    assert callback_of(trainer).scoring.length_normalize


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_scores_of_length_normalized_pairs(maker, kind):
    rows = tiny.pair_rows(8) if kind == "simpo" else tiny.argilla_rows(8)
    trainer = maker(kind, rows)(ica={"k": 2})
    check_scores(trainer, labelled_pair)
    assert callback_of(trainer).scoring.length_normalize


def test_scores_of_kto(maker):
    trainer = maker("kto", tiny.kto_rows(8))(ica={"k": 2}, micro_batch=4)

    def rows_of(row):
        prompt = row["prompt_ids"]
        completion = row["completion_ids"]
        return [(prompt + completion, [False] * len(prompt) + [True] * len(completion))], row["label"]

    check_scores(trainer, rows_of)
    callback = callback_of(trainer)
    assert {
        callback.holdout.examples[d].desirable for demos in callback.state.shown(range(len(callback.train))) for d in demos
    } == {True}


def test_scores_and_weights_stay_with_their_rows(maker):
    """Shuffled, packed, and with long rows dropped by the host: by content, not by position."""
    rows = tiny.sft_rows(12, turns=2)
    straight = check_weights_stay_with_rows(maker("sft", rows, shuffle_merged_datasets=False)(ica={}))
    shuffled = check_weights_stay_with_rows(maker("sft", rows[::-1], shuffle_merged_datasets=True)(ica={}))
    packed = check_weights_stay_with_rows(
        maker("sft", rows, sample_packing=True, num_epochs=2)(ica={"refresh_interval": "never"})
    )
    assert straight.keys() == shuffled.keys() == packed.keys() and len(straight) == 12
    for content, (score, weight) in straight.items():
        for other in (shuffled, packed):
            assert other[content] == (pytest.approx(score, abs=1e-3), pytest.approx(weight, rel=1e-3))

    lengths = sorted(len(content) for content in straight)
    dropped = check_weights_stay_with_rows(maker("sft", rows, sequence_len=lengths[-3])(ica={}))
    assert 0 < len(dropped) < 12
    for content, (score, _) in dropped.items():
        assert score == pytest.approx(straight[content][0], abs=1e-3)


def test_preference_weights_stay_with_their_rows(maker):
    rows = tiny.pair_rows(10)
    by_content = check_weights_stay_with_rows(maker("dpo", rows)(ica={}))
    reversed_rows = check_weights_stay_with_rows(maker("dpo", rows[::-1])(ica={}))
    assert by_content.keys() == reversed_rows.keys() and len(by_content) == 10
    for content, (score, weight) in by_content.items():
        assert reversed_rows[content] == (pytest.approx(score, abs=1e-3), pytest.approx(weight, rel=1e-3))


def test_weights_come_from_the_scores_in_the_file(maker):
    trainer = maker("sft", tiny.sft_rows(10))(ica={"temperature": 0.5})
    trainer.train()
    import pyarrow.parquet as pq

    callback = callback_of(trainer)
    table = pq.read_table(callback.files.folder / "scores.parquet").to_pandas()
    expected = weights_from_scores(table.score.to_numpy(), callback.config, tokens=table.tokens.to_numpy(), by_token=True).values
    assert np.allclose(table.weight, expected, rtol=1e-5)
    assert (table.weight * table.tokens).sum() / table.tokens.sum() == pytest.approx(1, abs=1e-5)


def test_a_runs_scores_serve_as_weights_of_the_same_rows_alone(maker, tmp_path):
    """Axolotl shuffles rows, so a run's row numbers are not the file's: `select` and another order of rows refuse them."""
    rows = tiny.sft_rows(10)
    first = maker("sft", rows)(ica={})
    first.train()
    scores = callback_of(first).files.folder / "scores.parquet"
    kept = tmp_path / "kept.parquet"
    kept.write_bytes(scores.read_bytes())
    with pytest.raises(ICAError, match="do not stand as in the data file: Axolotl shuffles them"):
        select_rows(scores, tiny.write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "best.jsonl", Choice())
    again = maker("sft", rows)(ica={"weights": str(kept)})
    assert np.allclose(callback_of(again).weights, callback_of(first).weights)
    with pytest.raises(ICAError, match="another number of supervised tokens"):
        maker("sft", rows, seed=8)(ica={"weights": str(kept)})


def test_rows_without_supervised_tokens_get_weight_zero(maker, capsys):
    rows = tiny.sft_rows(8)
    rows[3]["messages"] = [{"role": "user", "content": "red green blue"}]
    trainer = maker("sft", rows, shuffle_merged_datasets=False)(ica={})
    assert "1 of 8 train rows have no supervised token (first: row 3)" in capsys.readouterr().err
    trainer.train()
    assert callback_of(trainer).weights[3] == 0


def test_a_trained_output_embedding_with_a_fused_loss_stops(maker, tmp_path):
    """Liger's fused loss never calls the output embedding: exact on frozen embeddings, refused on trained ones."""
    import checks

    trainer = maker("sft", ROWS["sft"]())(ica={})
    checks.start_training(trainer)
    callback = callback_of(trainer)
    callback.refresh(list(range(8)), shared=True)
    batch = trainer._prepare_inputs(trainer.data_collator(checks.features_of(trainer, [0, 1])))
    trainer.model.forward = lambda input_ids, attention_mask, labels, **_: {
        "loss": trainer.model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.sum()
    }
    with pytest.raises(ICAError, match="did not pass through the model's output embedding"):
        trainer.compute_loss(trainer.model, batch)


def test_a_batch_without_row_ids_stops(maker):
    import checks

    trainer = maker("sft", ROWS["sft"]())(ica={})
    checks.start_training(trainer)
    batch = trainer.data_collator(checks.features_of(trainer, [0, 1]))
    del batch["ica_rows"]
    with pytest.raises(ICAError, match="without row ids"):
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
