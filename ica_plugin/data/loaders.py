"""The holdout, read as the host reads its train rows: what every host's loader does and refuses alike."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ICAConfig
from ..errors import ICAError
from .read import Collator, read_examples, refuse_transform
from .store import Rows

# What is named so is a file, never a hub id.
LOCAL_ENDINGS = {".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt"}

NO_ROWS = "Give at least one good example; 50 to 500 serve well."


@dataclass(frozen=True)
class Source:
    """Where a holdout is.

    Attributes:
        name: as the user named it, for messages; never a whole entry, which may hold a token.
        entry: what the host's reader takes.
        file: the local file or folder, None for a hub id.
    """

    name: str
    entry: Any
    file: Path | None = None


class HoldoutLoader(ABC):
    """Reads the holdout sets of one run. A host says how an entry is found and read; what is refused is decided here.

    Called with the block for one set it returns (name for messages, rows).

    Attributes:
        collator: the trainer's own.
        limit: (name of the setting, tokens) over which the host cuts or refuses a row; None where it has none.
    """

    collator: Collator
    limit: tuple[str, int] | None = None

    def __call__(self, config: ICAConfig) -> tuple[str, Rows]:
        """The rows of one set, tokenised as the train rows are.

        Raises:
            ICAError: the holdout cannot be read as the run's data is, is empty, or has a row that the host would cut.
        """
        name, dataset = self.dataset(config)
        return name, self.examples(name, self.prepare(name, dataset), self.collator)

    def dataset(self, config: ICAConfig) -> tuple[str, Any]:
        """(name for messages, `datasets.Dataset`) of one set, as the host's reader gives it.

        Raises:
            ICAError: not there, malformed, unreadable or empty.
        """
        source = self.find(config.holdout)
        try:
            dataset = self.read(source)
        except ICAError:
            raise
        except Exception as error:  # each host's readers raise many types
            malformed = json_error(source.file) if source.file is not None else None
            if malformed:
                raise ICAError(f"ica.holdout: malformed json: {malformed}. Correct or remove that line.") from error
            raise ICAError(f"ica.holdout: {source.name}: {self.explain(error, source)}") from error
        if not hasattr(dataset, "__len__"):
            raise ICAError(f"ica.holdout: {source.name} is streamed; load it whole (`streaming=False`).")
        if len(dataset) == 0:
            raise ICAError(f"ica.holdout: {source.name} {self.why_empty(source)}. {NO_ROWS}")
        refuse_transform(dataset, f"ica.holdout: {source.name}")
        return source.name, dataset

    def examples(self, name: str, dataset: Any, collator: Collator) -> Rows:
        """Tokenised rows of the dataset.

        Raises:
            ICAError: a row over the host's limit.
        """
        try:
            rows = read_examples(dataset, collator)
        except ICAError as error:
            raise ICAError(f"ica.holdout: {name}: {error}") from None
        if self.limit is not None and (rows.longest > self.limit[1]).any():
            setting, tokens = self.limit
            too_long = np.flatnonzero(rows.longest > tokens)
            raise ICAError(
                f"ica.holdout: {name}: {len(too_long)} row(s) are longer than {setting} ({tokens}), first row {too_long[0]} with "
                f"{rows.longest[too_long[0]]} tokens. Shorten or remove them, or raise {setting}."
            )
        return rows

    @abstractmethod
    def find(self, holdout: Any) -> Source:
        """Where the block's `holdout` is; raises ICAError where it is not there."""

    @abstractmethod
    def read(self, source: Source) -> Any:
        """The rows as a `datasets.Dataset`; may raise anything."""

    @abstractmethod
    def explain(self, error: Exception, source: Source) -> str:
        """What a user should do about an error of `read`."""

    def prepare(self, name: str, dataset: Any) -> Any:
        """The rows in the columns of the trainer's own train dataset, never cut or packed."""
        return dataset

    def why_empty(self, source: Source) -> str:
        """Why a holdout may have come out empty."""
        return "has no rows"


def local_path(text: str) -> Path | None:
    """The file or folder that `text` names; None for what may be a hub id.

    Raises:
        ICAError: `text` names a file, and there is none.
    """
    path = Path(text).expanduser()
    if path.exists():
        return path
    if "://" not in text and (path.suffix.lower() in LOCAL_ENDINGS or text.startswith((".", "/", "~"))):
        raise ICAError(f"ica.holdout: {text}: no such file or folder (looked for {path.absolute()}).")
    return None


def expanded(value: Any) -> Any:
    """A path, or a list or mapping of them, with each leading `~` as the user's home; all else as it is."""
    if isinstance(value, Mapping):
        return {key: expanded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [expanded(item) for item in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


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
