"""A holdout given as rows in memory, in whatever form they are in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from ..errors import ICAError
from ..log import get_logger

FORMS = "Give a path, a hub id, a `datasets.Dataset` or DatasetDict, a pandas DataFrame, a list of rows (dicts), or the keys of a dataset entry."


def sets_in_memory(holdout: Any) -> dict[str, Dataset] | None:
    """The rows of each named set; None where `holdout` says where they are instead: a path, a dataset entry, a list of named sets.

    Of several datasets the one named `train` is the holdout, as it is where the same dataset is named by its path; without it
    each is a set by its name. One alone has the name "".

    Raises:
        ICAError: neither, or rows that can be read once alone.
    """
    if isinstance(holdout, str | Path):
        return None
    if isinstance(holdout, Mapping):
        if not any(hasattr(part, "column_names") for part in holdout.values()):
            return None
        if len(holdout) > 1 and "train" in holdout:
            get_logger().info("holdout: of the splits %s, `train` is the holdout.", ", ".join(holdout))
        chosen = holdout["train"] if "train" in holdout else next(iter(holdout.values())) if len(holdout) == 1 else None
        return {str(name): _rows(part) for name, part in holdout.items()} if chosen is None else {"": _rows(chosen)}
    if isinstance(holdout, list) and holdout and all(isinstance(entry, Mapping) and "path" in entry for entry in holdout):
        return None
    return {"": _rows(holdout)}


def refuse_iterator(value: Any, what: str) -> None:
    """Raise ICAError for a generator or another iterator: what was read of it is gone."""
    if isinstance(value, Iterator):
        raise ICAError(
            f"{what}: a {type(value).__name__} can be read once alone, and it is read several times. Give `list(…)` of it."
        )


def _rows(value: Any) -> Dataset:
    refuse_iterator(value, "holdout")
    if isinstance(value, IterableDataset):
        raise ICAError(
            "holdout: an IterableDataset has no fixed rows, which are shown again and again. Load it whole (`streaming=False`), or give "
            "`Dataset.from_list(list(…))` of it."
        )
    if hasattr(value, "column_names"):
        return value
    if type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "columns"):
        return Dataset.from_pandas(value, preserve_index=False)
    if isinstance(value, list | tuple):
        others = [row for row in value if not isinstance(row, Mapping)]
        if not others:
            return Dataset.from_list([dict(row) for row in value])
        raise ICAError(f"holdout: a {type(value).__name__} of {type(others[0]).__name__} is none of what it can be. {FORMS}")
    raise ICAError(f"holdout: {type(value).__name__} is none of what it can be. {FORMS}")
