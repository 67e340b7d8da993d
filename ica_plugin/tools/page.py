"""One self-contained HTML file: verdicts, a table of rows to search and sort, pictures, and the numbers folded below."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ICAError

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ title }}</title><style>
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ddd; --box: #f4f6f8; --quiet: #555 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #16181b; --line: #3a3e44; --box: #22262b; --quiet: #aaa }
  img { filter: invert(1) hue-rotate(180deg) }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: var(--text);
       background: var(--page) }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td { white-space: pre-wrap; overflow-wrap: anywhere }
td.number, td.dt-type-numeric { text-align: right; white-space: nowrap; overflow-wrap: normal }
img { max-width: 100% } p { max-width: 52rem } summary { cursor: pointer; font-size: 1.2em; margin: 1rem 0 }
.verdict { background: var(--box); border-left: 4px solid #3b7dd8; padding: .6rem 1rem; margin: .7rem 0 }
.verdict p { margin: .2rem 0; color: var(--quiet) } .verdict pre { margin: .4rem 0; overflow-x: auto }
</style>{% if rows %}
<script>document.documentElement.classList.toggle("dark", matchMedia("(prefers-color-scheme: dark)").matches)</script>{% endif %}
</head><body><h1>{{ title }}</h1>
{% for verdict in verdicts %}<div class="verdict"><strong>{{ verdict.title }}</strong>
{% if verdict.evidence %}<p>{{ verdict.evidence }}</p>{% endif %}
{% if verdict.block %}<pre>{{ verdict.block }}</pre>{% endif %}</div>
{% endfor %}
{% if rows %}<h2>Rows</h2>{% if about_rows %}<p>{{ about_rows }}</p>{% endif %}
{{ rows|safe }}{% endif %}
{% for section in sections if section.picture %}<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
<img alt="{{ section.title }}" src="data:image/png;base64,{{ section.picture }}">
{% endfor %}
<details><summary>Numbers</summary>
{% for section in sections if section.rows or not section.picture %}<h3>{{ section.title }}</h3>
{% if section.text and not section.picture %}<p>{{ section.text }}</p>{% endif %}
{% if section.rows %}<table><tr>{% for name in section.rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr>{% for value in row.values() %}<td{% if value is number %} class="number"{% endif %}>{{ shown(value) }}</td>
{%- endfor %}</tr>
{% endfor %}</table>{% endif %}
{% endfor %}</details></body></html>
"""

NOT_INSTALLED = "the page needs {}, which is not installed: pip install 'ica-plugin[report]'"


@dataclass
class Verdict:
    """What a reader should know or do.

    Attributes:
        title: one sentence.
        evidence: what it rests on, and how far chance goes.
        block: YAML, ready to paste.
    """

    title: str
    evidence: str = ""
    block: str = ""


@dataclass
class Section:
    """A heading with a paragraph, a picture (base64 PNG) and a table (dicts with equal keys)."""

    title: str
    text: str = ""
    picture: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class RowTable:
    """Rows of data, dicts with equal keys, that a reader searches and sorts.

    Attributes:
        rows: of the table.
        about: which rows these are.
    """

    rows: list[dict[str, Any]]
    about: str = ""


def picture(draw: Callable[[Any], None], size: tuple[float, float] = (9, 3.5)) -> str:
    """What `draw(axes)` draws, as a base64 PNG.

    Raises:
        ICAError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ICAError(NOT_INSTALLED.format("matplotlib")) from None
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def write_page(
    out: Path,
    title: str,
    sections: list[Section],
    data: dict[str, Any],
    *,
    verdicts: Iterable[Verdict] = (),
    rows: RowTable | None = None,
) -> None:
    """Write `out` (HTML) and, beside it, `data` as JSON.

    Raises:
        ICAError: jinja2 or itables is not installed.
    """
    try:
        from jinja2 import Environment
    except ImportError:
        raise ICAError(NOT_INSTALLED.format("jinja2")) from None
    page = (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            title=title,
            sections=sections,
            shown=_shown,
            verdicts=verdicts,
            rows=_interactive(rows.rows) if rows is not None and rows.rows else "",
            about_rows=rows.about if rows is not None else "",
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(data, indent=2, default=float) + "\n", encoding="utf-8")


def _interactive(rows: list[dict[str, Any]]) -> str:
    """The table with its script and styles inside, so that it works without a network; text in it is escaped by itables."""
    try:
        from itables import options, to_html_datatable
        from itables.javascript import generate_init_offline_itables_html
    except ImportError:
        raise ICAError(NOT_INSTALLED.format("itables")) from None
    import pandas as pd

    rounded = [{name: _cell(value) for name, value in row.items()} for row in rows]
    table = to_html_datatable(
        pd.DataFrame(rounded),
        connected=False,
        showIndex=False,
        maxBytes=0,
        lengthMenu=[10, 25, 100],
        classes="display compact",
        style="width:100%",
    )
    return generate_init_offline_itables_html(options.dt_bundle) + table


def duration(seconds: float) -> str:
    """Seconds in words: what a reader plans with."""
    return (
        f"{seconds:.0f} seconds"
        if seconds < 90
        else f"{seconds / 60:.0f} minutes"
        if seconds < 5400
        else f"{seconds / 3600:.1f} hours"
    )


def _cell(value: Any) -> Any:
    """Three digits, since further ones are noise; and line ends as a sign, since the table's cells have none."""
    if isinstance(value, str):
        return " ⏎ ".join(value.splitlines())
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _shown(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
