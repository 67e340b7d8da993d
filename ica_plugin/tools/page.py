"""One self-contained HTML file: headings, tables and pictures, no script and no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ICAError

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
td { white-space: pre-wrap; overflow-wrap: anywhere } td.number { text-align: right; white-space: nowrap; overflow-wrap: normal }
img { max-width: 100% } p { max-width: 48rem }
</style></head><body><h1>{{ title }}</h1>
{% for section in sections %}<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.picture %}<img alt="{{ section.title }}" src="data:image/png;base64,{{ section.picture }}">{% endif %}
{% if section.rows %}<table><tr>{% for name in section.rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr>{% for value in row.values() %}<td{% if value is number %} class="number"{% endif %}>{{ shown(value) }}</td>
{%- endfor %}</tr>
{% endfor %}</table>{% endif %}
{% endfor %}</body></html>
"""


@dataclass
class Section:
    """A heading with a paragraph, a picture (base64 PNG) and a table (dicts with equal keys)."""

    title: str
    text: str = ""
    picture: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


def picture(draw: Callable[[Any], None], size: tuple[float, float] = (9, 3.5)) -> str:
    """What `draw(axes)` draws, as a base64 PNG.

    Raises:
        ICAError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ICAError("the page has plots, and matplotlib is not installed: pip install 'ica-plugin[report]'") from None
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def write_page(out: Path, title: str, sections: list[Section], data: dict[str, Any]) -> None:
    """Write `out` (HTML) and, beside it, `data` as JSON.

    Raises:
        ICAError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment
    except ImportError:
        raise ICAError("the page needs jinja2, which is not installed: pip install 'ica-plugin[report]'") from None
    page = Environment(autoescape=True).from_string(TEMPLATE).render(title=title, sections=sections, shown=_shown)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(data, indent=2, default=float) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
