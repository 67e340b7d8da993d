"""The `ica-plugin` command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from ..config import ICAConfig
from ..errors import V1, ICAError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Tools around the `ica:` block of a training config.")


Config = Annotated[Path, typer.Argument(help="An Axolotl or LLaMA-Factory config with an `ica:` block.")]


@app.command()
def validate(
    config: Config,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the host prints, too.")] = False,
) -> None:
    """Check a config, its data and its holdout through the host's own loaders, without loading the model."""
    from .quiet import quiet

    with _errors(config), quiet(verbose):
        summary = _host(config).validate(config)
    table = Table(show_header=False)
    for name, value in summary.items():
        table.add_row(name, str(value))
    Console().print(f"{config}: ready to train", soft_wrap=True)
    Console().print(table)


@app.command()
def score(
    config: Config,
    out: Annotated[Path, typer.Option(help="The scores, as a parquet file.")] = Path("scores.parquet"),
    score: Annotated[str | None, typer.Option(help='Scorers instead of the config\'s, as in "ica + likelihood".')] = None,
) -> None:
    """Score every train row with the model as the config loads it, and train nothing.

    Several processes: accelerate launch -m ica_plugin score CONFIG --out scores.parquet
    """
    from .score import write_scores

    with _errors(config):
        written = write_scores(_host(config), config, out, score)
    if written:
        Console().print(f"{written} rows scored: {out}")


@app.command()
def select(
    scores: Annotated[Path, typer.Argument(help="A scores file of `ica-plugin score`, or a run's ica/scores.parquet.")],
    data: Annotated[Path, typer.Option(help="The data file that was scored: jsonl, json, csv or parquet.")],
    out: Annotated[Path, typer.Option(help="Where the selected rows go, in the same format.")],
    keep: Annotated[
        float | None, typer.Option(help="Share of the scored rows to keep, best first; 0.5 where nothing else says.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="The same as a number of rows.")] = None,
    band: Annotated[
        tuple[float, float] | None, typer.Option(help="Only rows between two quantiles of the scores, as in 0.25 0.75.")
    ] = None,
    round_robin: Annotated[
        bool, typer.Option("--round-robin", help="The holdout rows take turns, each picks the best row it was shown to.")
    ] = False,
    per_source: Annotated[
        str | None, typer.Option(help="FIELD=N: at most N rows of each value of the data's field, as in source=200.")
    ] = None,
    max_cosine: Annotated[
        float | None, typer.Option(help="Leave out rows that are nearer than this to a better one's text, as in 0.9.")
    ] = None,
) -> None:
    """Write the best rows of a data file, in their order and unchanged."""
    from .select import Choice, select_rows

    choice = Choice(keep, rows, band, round_robin, per_source, max_cosine)
    with _errors(scores):
        written, total = select_rows(scores, data, out, choice)
    Console().print(f"{written} of {total} rows: {out}")


@app.command()
def report(
    output_dir: Annotated[Path, typer.Argument(help="The `output_dir` of a run with an `ica:` block.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; the numbers lie beside it as JSON. Default: in the run's ica folder.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The run's config, for the text of its rows: loads its data and model.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="The `output_dir` of the same run without the block, to say whether it helped.")
    ] = None,
) -> None:
    """What a finished run did: whether it helped, what it cost, which rows were trained how often, with which weights."""
    from .report import write_report

    with _errors(config or output_dir):
        page = write_report(output_dir, out, host=_host(config) if config else None, config=config, against=against)
    Console().print(f"{page} and {page.with_suffix('.json')}")


@app.command()
def audit(
    config: Config,
    out: Annotated[Path, typer.Option(help="The HTML file; the numbers lie beside it as JSON.")] = Path("audit.html"),
    rows: Annotated[int, typer.Option(min=20, help="Train rows to score, drawn by the block's seed.")] = 200,
    planted: Annotated[int, typer.Option(min=5, help="Of these, rows that are also scored corrupted.")] = 50,
    score: Annotated[
        list[str] | None, typer.Option(help="A scorer or a sum; may be given several times. Default: all that need no training.")
    ] = None,
) -> None:
    """What the scorers say of this data and model, before any training: distributions, agreement, sensitivity, planted noise."""
    from .audit import write_audit

    with _errors(config):
        page = write_audit(_host(config), config, out, rows=rows, planted=planted, scorers=score)
    Console().print(f"{page} and {page.with_suffix('.json')}")


@app.command()
def schema() -> None:
    """Print the JSON schema of the `ica:` block."""
    typer.echo(json.dumps(ICAConfig.model_json_schema(), indent=2))


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    try:
        yield
    except ICAError as error:
        typer.secho(f"{file}: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None


def _host(config: Path) -> ModuleType:
    """The host's module, told by the key that names the model."""
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
        from ..hosts.axolotl import tools as axolotl

        return axolotl
    if "model_name_or_path" in keys:
        if os.environ.get("USE_V1", "0").lower() in ("true", "y", "1"):
            raise ICAError(V1)
        from ..hosts.llamafactory import tools as llamafactory

        return llamafactory
    if "model" in keys and "train_dataset" in keys:
        raise ICAError(V1)
    raise ICAError("neither an Axolotl config (`base_model`) nor a LLaMA-Factory config (`model_name_or_path`).")


# `axolotl ica …`: Axolotl takes click commands from the entry-point group `axolotl.cli_commands`.
axolotl_command = typer.main.get_command(app)
