"""What every host's holdout loader checks alike."""

from __future__ import annotations

import json
from pathlib import Path


def json_error(path: str | Path) -> str | None:
    """Where a local .json or .jsonl file is malformed, as `file, line n: what is wrong`; None if it is another file or whole."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".json", ".jsonl") or not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"{path}: not UTF-8 ({error})"
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        parts = [(1, text)]
    else:
        # Not `splitlines`: a JSON string may hold the other line ends of Unicode.
        parts = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, part in parts:
        try:
            json.loads(part)
        except json.JSONDecodeError as error:
            return f"{path}, line {number + error.lineno - 1}: {error.msg} (column {error.colno})"
    return None
