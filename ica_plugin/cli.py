"""The `ica-plugin` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from .errors import ICAError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Tools around the `ica:` block of a training config.")


@app.callback()
def main() -> None:
    """Keeps `validate` a subcommand while it is the only one."""


@app.command()
def validate(config: Annotated[Path, typer.Argument(help="An Axolotl or LLaMA-Factory config with an `ica:` block.")]) -> None:
    """Check a config, its data and its holdout through the host's own loaders, without loading the model."""
    try:
        summary = _validator(config)(config)
    except ICAError as error:
        typer.secho(f"{config}: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None
    table = Table(show_header=False)
    for name, value in summary.items():
        table.add_row(name, str(value))
    Console().print(f"{config}: ready to train", soft_wrap=True)
    Console().print(table)


def _validator(config: Path):
    """The host's `validate`, told by the key that names the model."""
    if not config.is_file():
        raise ICAError("no such file.")
    try:
        keys = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise ICAError(f"not valid YAML: {error}") from None
    if not isinstance(keys, dict):
        raise ICAError("not a config: it holds no keys.")
    if "ica" not in keys:
        raise ICAError("there is no `ica:` block in it. Add `ica:` with at least `holdout: <path>`.")
    if "base_model" in keys:
        if not any("ica_plugin" in str(plugin) for plugin in keys.get("plugins") or []):
            raise ICAError(
                "it has an `ica:` block, but `plugins` does not list ica_plugin.ICAPlugin, so Axolotl would ignore the block "
                "and train unweighted. Add `plugins: [ica_plugin.ICAPlugin]`."
            )
        from .hosts.axolotl import validate

        return validate
    if "model_name_or_path" in keys:
        from .hosts.llamafactory import validate

        return validate
    raise ICAError("neither an Axolotl config (`base_model`) nor a LLaMA-Factory config (`model_name_or_path`).")
