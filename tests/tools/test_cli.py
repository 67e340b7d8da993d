import importlib
import json
import tomllib
from pathlib import Path

import click
import pytest
from typer.testing import CliRunner

from ica_plugin.config import ICAConfig
from ica_plugin.tools.cli import app


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("a: [", "not valid YAML"),
        ("- a", "holds no keys"),
        ("base_model: x", "there is no `ica:` block"),
        ("model: x\ntrain_dataset: y\nica: {holdout: x}", "v1 engine"),
        ("ica: {holdout: x}", "neither an Axolotl config"),
        ("base_model: x\nica: {holdout: x}", "`plugins` does not list ica_plugin.ICAPlugin"),
    ],
)
def test_validate_names_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "config.yml"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 1 and message in result.output


def test_v1_is_refused_before_the_host_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("USE_V1", "1")
    path = tmp_path / "config.yaml"
    path.write_text("model_name_or_path: x\nica: {holdout: x}")
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 1 and "v1 engine" in result.output


def test_schema_names_every_key():
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0 and set(json.loads(result.output)["properties"]) == set(ICAConfig.model_fields)


def test_axolotl_finds_the_command():
    group = tomllib.loads(Path("pyproject.toml").read_text())["project"]["entry-points"]["axolotl.cli_commands"]
    module, name = group["ica"].split(":")
    command = getattr(importlib.import_module(module), name)
    assert isinstance(command, click.Command) and {"validate", "score", "select", "audit", "report"} <= set(command.commands)
