import pytest

from ica_plugin.config import ICAConfig, parse_config
from ica_plugin.errors import ICAError


def test_defaults():
    config = parse_config({"holdout": "good.jsonl"})
    assert config.model_dump() == {
        **ICAConfig(holdout="x").model_dump(),
        "holdout": "good.jsonl",
    }
    assert (config.k, config.refresh_interval, config.refresh_scope) == (3, "never", "window")
    assert (config.weighting, config.temperature, config.max_weight) == ("auto", 1.0, 10.0)
    assert (config.score, config.apply, config.candidates, config.epoch_share) == ("auto", "auto", 2, 1.0)
    assert (config.retrieval, config.seed) == ("policy", 42)


@pytest.mark.parametrize(
    ("block", "kind", "draws", "expected"),
    [
        ({}, "sft", True, ("ica + likelihood", "top", "sample", False)),
        ({}, "sft", False, ("ica + likelihood", "rank", "gradient", False)),
        ({}, "pair", True, ("ica", "top", "sample", True)),
        ({}, "unpaired", True, ("ica", "top", "sample", False)),
        ({"apply": "gradient"}, "pair", True, ("ica", "rank", "gradient", True)),
        ({"temperature": 0.5}, "sft", True, ("ica + likelihood", "softmax", "sample", False)),
        ({"keep": 0.3, "apply": "gradient"}, "sft", True, ("ica + likelihood", "top", "gradient", False)),
        ({"score": "rds", "weighting": "minmax", "length_normalize": False}, "pair", True, ("rds", "minmax", "sample", False)),
        ({"budget": 0.05}, "sft", True, ("ica", "top", "sample", False)),
    ],
)
def test_auto_follows_the_kind_of_run(block, kind, draws, expected):
    config = parse_config({"holdout": "x", **block}).resolved(kind, draws)
    assert (config.score, config.weighting, config.apply, config.length_normalize) == expected
    assert config.resolved(kind, draws) == config


@pytest.mark.parametrize(("value", "steps"), [("never", None), ("epoch", None), (5, 5), (0.1, 10), (0.001, 1)])
def test_interval_in_steps(value, steps):
    assert parse_config({"holdout": "x", "refresh_interval": value}).interval_steps(100) == steps


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ({"holdout": "x", "temprature": 2}, ["unknown key `temprature`", "did you mean `temperature`?"]),
        ({"holdout": "x", "refresh": "epoch"}, ["unknown key `refresh`", "refresh_interval"]),
        ({"holdout": "x", "temperature": 2, "keep": 0.3}, ["keys of several weightings are given (softmax, top)", "`weighting`"]),
        ({"holdout": "x", "apply": "gradient", "epoch_share": 0.5}, ["`epoch_share` below 1 goes with `apply: sample`"]),
        ({"holdout": "x", "k": 0}, ["ica.k: 0", "greater than or equal to 1"]),
        ({"holdout": "x", "k": "three"}, ["ica.k: 'three'", "integer"]),
        ({"holdout": "x", "temperature": -1}, ["ica.temperature: -1", "greater than 0"]),
        ({"holdout": "x", "temperature": float("nan")}, ["ica.temperature: nan", "finite"]),
        ({"holdout": "x", "weighting": "softmix"}, ["ica.weighting: 'softmix'", "'softmax'", "'band'"]),
        ({"holdout": "x", "refresh_interval": 0}, ["ica.refresh_interval: 0", "never, epoch", "fraction"]),
        ({"holdout": "x", "refresh_interval": 1.5}, ["ica.refresh_interval: 1.5", "between 0 and 1"]),
        ({"holdout": "x", "refresh_interval": "daily"}, ["ica.refresh_interval: 'daily'", "epoch"]),
        ({"holdout": "x", "refresh_interval": True}, ["ica.refresh_interval: True"]),
        ({"holdout": "x", "band": [0.8, 0.2]}, ["ica.band", "low < high"]),
        ({"holdout": "x", "max_weight": 0.5}, ["ica.max_weight: 0.5", "greater than 1"]),
        ({"holdout": ""}, ["ica.holdout: ''", "is empty"]),
        ({"k": 3}, ["`holdout` is required"]),
        ("good.jsonl", ["must be a block of keys"]),
        (None, ["must be a block of keys"]),
    ],
)
def test_wrong_blocks_name_key_value_and_what_is_allowed(block, parts):
    with pytest.raises(ICAError) as error:
        parse_config(block)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_every_wrong_key_has_its_line():
    with pytest.raises(ICAError) as error:
        parse_config({"holdout": "x", "k": 0, "temperature": 0, "keep": 2})
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["ica.k", "ica.temperature", "ica.keep"]


def test_weights_replace_the_holdout():
    assert parse_config({"weights": "weights.csv"}).holdout is None
