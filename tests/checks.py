"""Test bodies that every host's trainers must pass, and the plain references they compare with.

Each check takes `make_trainer(**settings)`, which builds the host's own trainer; with `ica=None` it is the host's
own run without the plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ica_plugin.data.read import read_examples, without_text_columns
from ica_plugin.data.row_ids import ROW_IDS
from ica_plugin.data.scores import read_scores
from ica_plugin.run.callback import ICACallback

MakeTrainer = Callable[..., object]


def callback_of(trainer) -> ICACallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, ICACallback))


def write_weights(path: Path, weights) -> Path:
    """A file whose `row` counts the trainer's rows, as its `source` says where the host moves them."""
    rows = np.arange(len(weights))
    pq.write_table(pa.table({"row": rows, "source": rows, "weight": np.asarray(weights, dtype=np.float64)}), path)
    return path


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def gradients(trainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    found = {name: p.grad.detach().clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return found


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum(float((found[n].double() - expected[n].double()).pow(2).sum()) for n in found) ** 0.5
    size = sum(float(expected[n].double().pow(2).sum()) for n in expected) ** 0.5
    assert size > 0
    return difference / size


def start_training(trainer) -> None:
    """What `train()` does before the first step, as far as the loss needs it."""
    trainer.state.max_steps = 1
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.model.train()


def features_of(trainer, rows: list[int], drop: tuple[str, ...] = ()) -> list[dict]:
    """Rows of the train dataset as the host's collator gets them."""
    dataset = without_text_columns(trainer.train_dataset)
    return [{key: value for key, value in dataset[row].items() if key not in drop} for row in rows]


def check_gradients(
    make_trainer: MakeTrainer, tmp_path: Path, *, token_mean: bool, packed: bool = False, tolerance: float = 1e-5
) -> float:
    """The gradient of one weighted batch equals an explicit weighted sum of single-row losses.

    The batch comes out of the host's own data loader. The single-row losses are the host's own too, of a trainer without
    the plugin, one row per batch. `token_mean`: the host averages a batch over tokens, so row i counts with its share of
    supervised tokens; otherwise with 1 / rows.
    """
    weights = np.random.default_rng(0).uniform(0.1, 3.0, 64)
    drop = ("length", "attention_mask") if packed else ("length",)
    size = 1 if packed else 4  # a packed line holds several rows
    plain = make_trainer(ica=None, micro_batch=size)
    weighted = make_trainer(
        ica=lambda n: {"weights": str(write_weights(tmp_path / "weights.parquet", weights[:n]))}, micro_batch=size
    )
    weighted.model.load_state_dict(plain.model.state_dict())
    start_training(weighted)
    batch = weighted._prepare_inputs(next(iter(weighted.get_train_dataloader())))
    picked = [row for row in batch[ROW_IDS].unique().tolist() if row >= 0]
    assert len(picked) >= 3
    unweighted_batch = {key: value for key, value in batch.items() if key != ROW_IDS}
    found = gradients(weighted, weighted.compute_loss(weighted.model, batch))

    plain.model.train()
    examples = read_examples(plain.train_dataset, plain.data_collator)
    tokens = np.array([examples[row].supervised_tokens for row in picked], dtype=float)
    share = tokens / tokens.sum() if token_mean else np.full(len(picked), 1 / len(picked))
    total = torch.zeros(())
    for row, part in zip(picked, share, strict=True):
        single = plain.data_collator(features_of(plain, [row], drop))
        loss = plain.compute_loss(plain.model, plain._prepare_inputs(single))
        total = total + weights[row] * part * loss
    error = relative_error(found, gradients(plain, total))
    assert error < tolerance, error

    # And the weights matter: the unweighted gradient is far away.
    assert relative_error(found, gradients(plain, plain.compute_loss(plain.model, unweighted_batch))) > 1e-2
    return error


def check_accumulation(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """One step of micro-batch 1 with accumulation 4 equals one step of micro-batch 4, with weights.

    Rows must have equal token counts where the host averages micro-batches over tokens.
    """
    ends, starts = [], []
    weights = np.random.default_rng(1).uniform(0.1, 3.0, 64)
    for micro_batch, accumulation in ((1, 4), (4, 1)):
        trainer = make_trainer(
            ica=lambda n: {"weights": str(write_weights(tmp_path / "weights.parquet", weights[:n]))},
            micro_batch=micro_batch,
            accumulation=accumulation,
            max_steps=1,
        )
        starts.append(parameters(trainer))
        trainer.train()
        ends.append(parameters(trainer))
    moved = {name: ends[1][name] - starts[1][name] for name in starts[1]}
    other = {name: ends[0][name] - starts[0][name] for name in starts[0]}
    error = relative_error(other, moved)
    assert error < 1e-4, error


def check_all_weights_one(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Five steps with all weights 1, given or scored, end in the host's own parameters, bit for bit."""
    blocks = {
        "plain": None,
        "given": lambda n: {"weights": str(write_weights(tmp_path / "ones.parquet", np.ones(n)))},
        # Every row is in the best fraction of 1: scoring happens, twice, and every weight is 1.
        "scored": lambda n: {"weighting": "top", "keep": 1.0, "refresh_interval": 2, "refresh_scope": "all"},
        "window": lambda n: {"weighting": "top", "keep": 1.0, "refresh_interval": 2},
    }
    ends = {}
    for name, block in blocks.items():
        trainer = make_trainer(ica=block, max_steps=5)
        start = parameters(trainer)
        trainer.train()
        ends[name] = parameters(trainer)
        assert any(not torch.equal(start[key], ends[name][key]) for key in start)
        if name in ("scored", "window"):
            assert callback_of(trainer).state.counts.refreshes >= 2
            assert (callback_of(trainer).weights[~callback_of(trainer).weights.isnan()] == 1).all()
    for name in ("given", "scored", "window"):
        for key, value in ends["plain"].items():
            assert torch.equal(value, ends[name][key]), (name, key)


@torch.no_grad()
def reference_logprob(model, tokens, scored, length_normalize: bool) -> float:
    """One row, one forward, every logit: the sum (or mean) of the log-probs of the scored tokens."""
    was_training = model.training
    model.eval()
    ids = torch.as_tensor(np.asarray(tokens))[None].to(next(model.parameters()).device)
    logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    model.train(was_training)
    picked = [logprobs[t - 1, ids[0, t]].item() for t in range(1, ids.shape[1]) if scored[t]]
    return float(np.mean(picked) if length_normalize else np.sum(picked))


def reference_score(model, row: list[tuple], demonstrations: list, length_normalize: bool, desirable: bool = True) -> float:
    """ICA of one row, written out. `row`: (tokens, scored) of the response, or of chosen and rejected."""
    context = [token for demonstration in demonstrations for token in demonstration]
    differences = []
    for tokens, scored in row:
        base = reference_logprob(model, tokens, scored, length_normalize)
        shifted = reference_logprob(model, [*context, *tokens], [False] * len(context) + list(scored), length_normalize)
        differences.append(shifted - base)
    score = differences[0] if len(row) == 1 else differences[0] - differences[1]
    return score if desirable else -score


def check_scores(trainer, rows_of: Callable[[dict], tuple[list[tuple], bool]], *, tolerance: float = 1e-3) -> np.ndarray:
    """Scores of a trained-on policy equal the reference.

    Args:
        trainer: attached, before `train()`.
        rows_of: a raw row of `trainer.train_dataset` → [(tokens, scored), …] and whether it is desirable, read from the
            host's columns without the plugin's code.
    """
    trainer.train()
    callback = callback_of(trainer)
    # The policy has been trained: score it again as it is now, and compare.
    callback.refresh(list(range(len(callback.train))), shared=True)
    table = read_scores(callback.files.folder / "scores.parquet").to_pylist()
    last = {line["row"]: line for line in table if line["refresh"] == callback.state.counts.refreshes - 1}
    assert sorted(last) == list(range(len(trainer.train_dataset)))
    holdout = callback.holdout.examples
    worst = 0.0
    for row, line in last.items():
        sequences, desirable = rows_of(trainer.train_dataset[row])
        shown = [holdout[d].demonstration.tokens.tolist() for d in line["demos"]]
        expected = reference_score(trainer.model, sequences, shown, callback.scoring.length_normalize, desirable)
        worst = max(worst, abs(line["score"] - expected))
    assert worst < tolerance, worst
    assert np.std([line["score"] for line in last.values()]) > 0.05
    return np.array([last[row]["score"] for row in sorted(last)])


def record_training_weights(trainer) -> list[tuple[tuple, float]]:
    """Record (tokens of the row, weight used) for every training row, from what really enters the host's loss."""
    seen: list[tuple[tuple, float]] = []
    callback, loss = callback_of(trainer), trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        if ROW_IDS in inputs and model.training:
            rows = inputs[ROW_IDS]
            weights = callback.state.weights_of(rows)
            if rows.dim() == 1:
                for i in range(len(rows)):
                    seen.append((_row_tokens(inputs, i, len(rows)), float(weights[i])))
            else:
                for line in range(rows.shape[0]):
                    for row in [r for r in rows[line].unique(sorted=True).tolist() if r >= 0]:
                        here = rows[line] == row
                        assert len(weights[line][here].unique()) == 1
                        seen.append((tuple(inputs["input_ids"][line][here].tolist()), float(weights[line][here][0])))
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    return seen


def _row_tokens(inputs, i: int, rows: int) -> tuple:
    key, mask = next(
        (k, k.replace("input_ids", "attention_mask"))
        for k in ("input_ids", "chosen_input_ids", "completion_input_ids")
        if k in inputs
    )
    return tuple(inputs[key][i][inputs[mask][i] != 0].tolist())


def check_weights_stay_with_rows(trainer) -> dict[tuple, tuple[float, float]]:
    """Train, and check by content that each row was trained with its own weight.

    Returns:
        tokens of the (chosen) row → (score, weight).
    """
    seen = record_training_weights(trainer)
    trainer.train()
    callback = callback_of(trainer)
    table = read_scores(callback.files.folder / "scores.parquet").to_pylist()
    by_content = {
        tuple(callback.train[line["row"]].demonstration.tokens.tolist()): (line["score"], line["weight"]) for line in table
    }
    assert len(seen) > 0
    for tokens, weight in seen:
        assert abs(by_content[tokens][1] - weight) < 1e-6
    return by_content


def check_packed_gradients(
    make_trainer: MakeTrainer, tmp_path: Path, *, bins: int = 1, isolated: bool = True, **packing
) -> float:
    """The gradient of weighted packed rows equals an explicit weighted sum over the examples in them.

    Args:
        bins: packed rows in the batch.
        isolated: examples do not attend to each other, so each one's loss is that of the row alone, from a trainer that
            does not pack; otherwise it is the host's loss on the packed row with all other examples' labels masked.
        packing: the settings that make the host pack.
    """
    weights = np.random.default_rng(0).uniform(0.1, 3.0, 64)
    weighted = make_trainer(ica=lambda n: {"weights": str(write_weights(tmp_path / "weights.parquet", weights[:n]))}, **packing)
    plain = make_trainer(ica=None, **({} if isolated else packing))
    weighted.model.load_state_dict(plain.model.state_dict())
    start_training(weighted)
    batch = weighted._prepare_inputs(weighted.data_collator(features_of(weighted, list(range(bins)))))
    ids = batch[ROW_IDS].clone()
    found = gradients(weighted, weighted.compute_loss(weighted.model, batch))

    plain.model.train()
    examples = callback_of(weighted).train
    picked = [row for row in ids.unique().tolist() if row >= 0]
    assert len(picked) >= 3
    tokens = sum(examples[row].supervised_tokens for row in picked)
    place = {tuple(row["input_ids"]): i for i, row in enumerate(plain.train_dataset)}
    total = torch.zeros(())
    for row in picked:
        if isolated:
            single = plain.data_collator(features_of(plain, [place[tuple(examples[row].sequences[0].tokens.tolist())]]))
        else:
            single = plain.data_collator(features_of(plain, list(range(bins))))
            single["labels"] = torch.where(ids == row, single["labels"], -100)
        loss = plain.compute_loss(plain.model, plain._prepare_inputs(single))
        total = total + weights[row] * examples[row].supervised_tokens / tokens * loss
    error = relative_error(found, gradients(plain, total))
    assert error < 1e-5, error
    return error


def check_kto_gradients(make_trainer: MakeTrainer, tmp_path: Path, fields: Callable[[dict], tuple]) -> float:
    """The gradient of a weighted KTO batch equals an explicit weighted sum of KTO losses.

    KTO's KL estimate is a constant of the batch, so its single-row losses are written out here, not taken from the host.

    Args:
        fields: batch → (ids, attention, scored) of the rows, the same of the KL rows, and which rows are desirable.
    """
    weights = np.random.default_rng(0).uniform(0.1, 3, 64)
    plain = make_trainer(ica=None, micro_batch=4)
    weighted = make_trainer(ica=lambda n: {"weights": str(write_weights(tmp_path / "w.parquet", weights[:n]))}, micro_batch=4)
    weighted.model.load_state_dict(plain.model.state_dict())
    for trainer in (plain, weighted):  # away from the reference model, or the KL estimate is 0
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    start_training(weighted)
    batch = weighted.data_collator(features_of(weighted, [0, 1, 2, 3]))
    found = gradients(weighted, weighted.compute_loss(weighted.model, dict(batch)))

    def logprob(model, ids, attention, scored):
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
        return (logits.gather(2, ids[:, 1:, None]).squeeze(2) * scored[:, 1:]).sum(1)

    rows, kl_rows, good = fields(batch)
    with torch.no_grad():
        baseline = (logprob(plain.model, *kl_rows) - logprob(plain.ref_model, *kl_rows)).mean().clamp(min=0)
        assert baseline > 0
        base = logprob(plain.ref_model, *rows)
    ratio = logprob(plain.model, *rows) - base
    losses = 1 - torch.sigmoid(plain.beta * torch.where(good.bool(), ratio - baseline, baseline - ratio))
    expected = gradients(plain, (losses * torch.from_numpy(weights[:4]).float()).mean())
    error = relative_error(found, expected)
    assert error < 1e-5, error
    return error


def check_token_gradients(
    make_trainer: MakeTrainer, *, micro_batch: int = 4, drop: tuple[str, ...] = ("length",), **packing
) -> float:
    """The gradient of one batch with `drop_tokens` equals an explicit weighted sum over its tokens.

    The batch comes out of the host's own data loader. A row's part of the sum is the host's own loss of that row alone, of a trainer
    without the plugin, with the labels of the dropped tokens masked.

    Args:
        drop: columns that the host's collator does not take from a single row.
        packing: the settings that make the host pack.
    """
    block = {"drop_tokens": 0.2, "weighting": "rank", "k": 2}
    weighted, plain = make_trainer(ica=block, micro_batch=micro_batch, **packing), make_trainer(ica=None, micro_batch=micro_batch)
    weighted.model.load_state_dict(plain.model.state_dict())
    start_training(weighted)
    callback = callback_of(weighted)
    callback.refresh(list(range(len(callback.train))), shared=True)
    callback.refresh.parts.remove()
    lines = read_scores(callback.files.folder / "scores.parquet").to_pylist()
    batch = weighted._prepare_inputs(next(iter(weighted.get_train_dataloader())))
    picked = [row for row in batch[ROW_IDS].unique().tolist() if row >= 0]
    found = gradients(weighted, weighted.compute_loss(weighted.model, batch))

    count = np.array([line["tokens"] for line in lines])
    left = count - [len(line["dropped_tokens"]) for line in lines]
    of_row = np.array([line["weight"] for line in lines])
    factor = (of_row * count).sum() / (of_row * left).sum()
    assert len(picked) >= 3 and sum(len(lines[row]["dropped_tokens"]) for row in picked) >= 3 and factor > 1.02
    plain.model.train()
    place = {tuple(row["input_ids"]): i for i, row in enumerate(plain.train_dataset)}
    total = torch.zeros(())
    for row in picked:
        tokens = callback.train[row].sequences[0].tokens
        single = plain.data_collator(features_of(plain, [place[tuple(tokens.tolist())]], drop))
        labels = single["labels"]
        assert labels.shape[0] == 1 and single["input_ids"][0, : len(tokens)].tolist() == tokens.tolist()
        labels[0, lines[row]["dropped_tokens"]] = -100
        loss = plain.compute_loss(plain.model, plain._prepare_inputs(single))
        total = total + of_row[row] * factor * left[row] / count[picked].sum() * loss
    error = relative_error(found, gradients(plain, total))
    assert error < 1e-5, error
    return error
