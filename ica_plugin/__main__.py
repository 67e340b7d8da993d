"""`python -m ica_plugin`: the `ica-plugin` command, for launchers that start modules."""

from .tools.cli import app

app()
