import pytest
from typer.testing import CliRunner

from ica_plugin.tools.cli import app


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("a: [", "not valid YAML"),
        ("- a", "holds no keys"),
        ("base_model: x", "there is no `ica:` block"),
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
