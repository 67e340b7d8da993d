"""What a user reads when a config or a holdout is wrong."""

import json

import pytest
import yaml

import tiny
from harness import build, load_config, write_config
from ica_plugin.hosts.axolotl.args import config_of
from ica_plugin.hosts.axolotl.plugin import ICAPlugin


@pytest.fixture
def config(tmp_path, tiny_model):
    def write(kind="sft", ica=None, holdout=None, rows=None, **settings):
        make = tiny.sft_rows if kind == "sft" else tiny.pair_rows
        return write_config(
            tmp_path,
            tiny_model,
            kind,
            rows or make(6),
            holdout if holdout is not None else make(4, seed=3),
            ica or {},
            **settings,
        )

    return write


def message_of(path, load=build) -> str:
    with pytest.raises(Exception) as error:
        load(path)
    return str(error.value)


def test_unknown_key(config):
    text = message_of(config(ica={"temprature": 2.0}), load_config)
    assert "unknown key `temprature`: did you mean `temperature`?" in text


def test_wrong_value(config):
    text = message_of(config(ica={"weighting": "softmix"}), load_config)
    assert "ica.weighting" in text and "softmix" in text and "'softmax', 'minmax', 'rank', 'top' or 'band'" in text


def test_wrong_interval(config):
    text = message_of(config(ica={"refresh_interval": 1.5}), load_config)
    assert "ica.refresh_interval" in text and "fraction of the run between 0 and 1" in text


def test_plugin_without_block(config):
    path = config()
    keys = yaml.safe_load(path.read_text())
    del keys["ica"]
    path.write_text(yaml.safe_dump(keys))
    assert "there is no `ica:` block" in message_of(path, load_config)


@pytest.mark.parametrize("given", [{}, {"temperature": 1.0}, {"keep": 0.3}])
def test_the_block_is_what_the_user_gave_after_axolotl_s_validation(config, given):
    path = config()
    keys = yaml.safe_load(path.read_text())
    keys["ica"] = {"holdout": keys["ica"]["holdout"], **given}
    path.write_text(yaml.safe_dump(keys))
    block = config_of(load_config(path))
    assert block.model_fields_set == {"holdout", *given}
    weighting = {"temperature": "softmax", "keep": "top"}.get(next(iter(given), ""), "top")
    assert block.resolved("sft", draws=True).weighting == weighting


def test_missing_holdout_file(config):
    text = message_of(config(ica={"holdout": "data/nowhere.jsonl"}))
    assert "ica.holdout: data/nowhere.jsonl: no such file or folder" in text


def test_empty_holdout(config, tmp_path):
    path = config()
    (tmp_path / "holdout.jsonl").write_text("")
    assert "ica.holdout" in message_of(path)


def test_holdout_without_supervised_tokens(config):
    silent = [{"messages": [{"role": "user", "content": "red green"}]}] * 3
    assert "no rows with a supervised token" in message_of(
        config(holdout=silent)
    ) or "none of its 3 rows has a supervised token" in message_of(config(holdout=silent))


def test_holdout_row_over_the_context(config):
    rows = tiny.sft_rows(4, seed=3)
    rows[2]["messages"][1]["content"] = "red green blue " * 300
    text = message_of(config(holdout=rows))
    assert "longer than the run's context (sequence_len: 256)" in text


def test_preference_holdout_without_chosen(config):
    rows = [{k: v for k, v in row.items() if k != "chosen"} for row in tiny.pair_rows(4)]
    text = message_of(config(kind="dpo", holdout=rows))
    assert "`chosen` and `rejected`" in text and "ica.holdout" in text


def test_malformed_holdout(config, tmp_path):
    path = config()
    (tmp_path / "holdout.jsonl").write_text(json.dumps(tiny.sft_rows(1)[0]) + '\n{"messages": [\n')
    text = message_of(path)
    assert f"ica.holdout: malformed json: {tmp_path / 'holdout.jsonl'}, line 2: " in text


def test_coupled_loss(config):
    text = message_of(config(kind="dpo", dpo_loss_type=["aot"], dpo_loss_weights=[1.0]))
    assert "the loss `aot` couples the rows of a batch" in text


def test_unsupported_training(config):
    assert "is not supported by ica_plugin" in message_of_refusal({"rl": "grpo"})
    assert "reward models" in message_of_refusal({"reward_model": True})
    assert "streaming" in message_of_refusal({"pretraining_dataset": "x"})
    assert "context_parallel_size" in message_of_refusal({"context_parallel_size": 2})
    assert "deepspeed is not supported yet" in message_of_refusal({"deepspeed": "zero2.json"})
    assert "fsdp_config is not supported yet" in message_of_refusal({"fsdp_config": {"reshard_after_forward": True}})


@pytest.mark.parametrize(
    "settings",
    [
        {"reward_model": True},
        {"pretraining_dataset": "x"},
        {"context_parallel_size": 2},
        {"deepspeed": "zero2.json"},
        {"kd_trainer": True},
        {"use_ray": True},
    ],
    ids=str,
)
def test_a_refusal_names_the_way_that_works(settings):
    """Whatever is trained, rows can be chosen beforehand."""
    assert "`ica-plugin select`, and train what was selected" in message_of_refusal(settings)


def test_what_the_config_tells_is_refused_before_it_is_validated(config):
    # `load_cfg` registers plugins first; neither data nor model is there yet.
    assert "reward models" in message_of(config(reward_model=True), load_config)


def message_of_refusal(settings) -> str:
    from axolotl.utils.dict import DictDefault

    from ica_plugin.hosts.axolotl.args import refuse_unsupported

    with pytest.raises(ValueError) as error:
        refuse_unsupported(DictDefault(settings))
    return str(error.value)


def test_weights_file_with_a_missing_row(config, tmp_path):
    (tmp_path / "weights.csv").write_text("row,weight\n0,1.0\n1,0.5\n")
    text = message_of(config(ica={"weights": str(tmp_path / "weights.csv")}, shuffle_merged_datasets=False))
    assert "4 of 6 train rows have no weight, first 2" in text


def test_holdout_rows_that_are_trained_on_are_reported_and_never_shown_to_themselves(config, capsys):
    rows = tiny.sft_rows(6)
    trainer = build(config(rows=rows, holdout=rows[:2] + tiny.sft_rows(2, seed=3), ica={"k": 4}, shuffle_merged_datasets=False))
    assert "2 of 6 train rows are also in the holdout" in capsys.readouterr().err
    trainer.train()
    from checks import callback_of

    callback = callback_of(trainer)
    assert sorted(callback.state.shown([0])[0]) == [1, 2, 3] and sorted(callback.state.shown([1])[0]) == [0, 2, 3]
    assert "see fewer than k = 4 demonstrations" in capsys.readouterr().err


def test_an_untested_version_is_named(monkeypatch, capsys):
    from ica_plugin import versions

    monkeypatch.setattr(versions, "version", lambda host: "0.5.0")
    versions.warn_if_untested("axolotl")
    assert "axolotl 0.5.0 is outside the tested range (0.19.0 ≤ version < 0.22)" in capsys.readouterr().err


def test_the_schema_has_the_block(config):
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args

    load_config(config())
    schema = merge_input_args()[1].model_fields
    assert "ica" in schema and ICAPlugin().get_input_args() == "ica_plugin.hosts.axolotl.args.ICAArgs"
    PluginManager.get_instance().plugins.clear()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_validate_checks_a_config_without_the_model(config, kind):
    from axolotl.integrations.base import PluginManager
    from typer.testing import CliRunner

    from ica_plugin.tools.cli import app

    path = config(kind=kind)
    PluginManager.get_instance().plugins.clear()
    before = set(path.parent.rglob("*"))
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 0, result.output
    assert set(path.parent.rglob("*")) == before, "nothing is left on disk"
    assert "ready to train" in result.output and "holdout rows" in result.output

    path = config(kind=kind, ica={"k": 0})
    load = CliRunner().invoke(app, ["validate", str(path)])
    assert load.exit_code == 1 and "greater than or equal to 1" in load.output


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_tokens_of_preference_rows_are_refused_before_anything_is_loaded(config, kind):
    path = config(kind=kind, ica={"drop_tokens": "auto"})
    assert "ica.drop_tokens: the run trains on" in message_of(path, load_config)
