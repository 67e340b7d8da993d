"""What is hooked on a trainer, and that nothing of it is left."""

from __future__ import annotations

import pytest

import tiny
from checks import callback_of, parameters
from ica_plugin.data.row_ids import ROW_IDS, RowIdCollator
from ica_plugin.errors import ICAError
from runs import ROWS, build, refreshes, tokenised

HOOKED = {
    "_set_signature_columns_if_needed",
    "get_batch_samples",
    "compute_loss",
    "_save_rng_state",
    "_load_optimizer_and_scheduler",
}


def test_everything_is_taken_off_after_training_but_what_puts_it_on_again(tmp_path):
    plain = build(tmp_path / "plain", None)
    trainer = build(tmp_path / "run", {}, train=plain.train_dataset, max_steps=2)
    assert HOOKED <= vars(trainer).keys() and isinstance(trainer.data_collator, RowIdCollator)
    assert ROW_IDS in trainer.train_dataset.column_names
    trainer.train()
    assert not HOOKED & vars(trainer).keys()
    assert trainer.train_dataset is plain.train_dataset and type(trainer.data_collator) is type(plain.data_collator)
    assert {name for name, value in vars(trainer).items() if hasattr(value, "__wrapped__")} == {"train"}
    assert not [module for module in trainer.model.modules() if module._forward_hooks]
    callback_of(trainer).hooks.detach()
    assert "train" not in vars(trainer)


def test_a_second_train_is_weighted_as_the_first(tmp_path):
    trainer = build(tmp_path, {}, max_steps=2)
    trainer.train()
    first = len(trainer.trained)
    trainer.train()
    assert len(trainer.trained) == 2 * first and all(rows for _, rows, *_ in trainer.trained)
    assert [step for step, _ in refreshes(tmp_path)] == [0, 0]
    assert not HOOKED & vars(trainer).keys()


def test_another_dataset_after_attaching_is_refused(tmp_path):
    trainer = build(tmp_path, {}, max_steps=2)
    trainer.train()
    trainer.train_dataset = tokenised(ROWS, 1)
    with pytest.raises(ICAError, match="`trainer.train_dataset` was replaced after ica_plugin was attached"):
        trainer.train()


def test_what_somebody_hooked_on_after_us_stays_and_ours_below_it_is_passed_through(tmp_path):
    trainer = build(tmp_path, {}, max_steps=2, model=tiny.make_model())
    ours, calls = trainer.compute_loss, []

    def theirs(model, inputs, *args, **kwargs):
        calls.append(sorted(inputs))
        return ours(model, inputs, *args, **kwargs)

    trainer.compute_loss = theirs
    trainer.train()
    assert trainer.compute_loss is theirs and calls and all(ROW_IDS in keys for keys in calls)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset.select(range(2))])
    trainer.model.train()
    assert float(trainer.compute_loss(trainer.model, batch)) > 0, "the host's own loss, without weights"


def test_given_weights_of_a_second_train(tmp_path):
    ends = []
    for calls in (1, 2):
        trainer = build(tmp_path / str(calls), {"weights": "weight"}, train=tokenised(ROWS, 0).add_column("weight", [1.0] * ROWS))
        for _ in range(calls):
            trainer.train()
        ends.append(parameters(trainer))
    assert all(not (ends[0][name] == ends[1][name]).all() for name in ends[0] if "norm" not in name)
