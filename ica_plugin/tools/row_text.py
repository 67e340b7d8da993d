"""The text of a run's rows and of the holdout rows they were shown, through the host's own loaders."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import ICAError
from ..run.callback import ICACallback

ROW, DEMONSTRATION = 600, 200  # characters shown
STROKE = "\u0336"  # combines with the character before it


class RowText:
    """Text of train rows and of their demonstrations.

    Args:
        callback: of a run with these rows.
    """

    def __init__(self, callback: ICACallback):
        self._train, self._holdout = callback.train, callback.holdout
        self._tokenizer = callback.trainer.processing_class

    def of_row(self, row: int, dropped: Collection[int] = (), limit: int = ROW) -> dict[str, str]:
        """The beginning of a row's text; of a pair, `text` is the chosen one, and `rejected` stands beside it.

        Args:
            row: index of a train row.
            dropped: places of tokens that are left out of the loss; they are struck through.
            limit: characters.
        """
        sequences = self._train[row].sequences
        if dropped:
            return {"text": self._struck(sequences[0].tokens[:limit], set(dropped))}
        return {
            side: self._shortened(sequence.tokens, limit) for side, sequence in zip(("text", "rejected"), sequences, strict=False)
        }

    def _struck(self, tokens: np.ndarray, dropped: set[int]) -> str:
        """The text with a stroke over each character of the dropped tokens: text alone, which needs no markup."""
        parts = []
        for gone, places in groupby(range(len(tokens)), key=dropped.__contains__):
            part = self._tokenizer.decode(tokens[list(places)])
            parts.append("".join(f"{character}{STROKE}" for character in part) if gone else part)
        return "".join(parts)

    def of_demonstrations(self, holdout_rows: list[int]) -> str:
        """The beginnings of holdout rows, in the order in which they are shown."""
        shown = [self._holdout.examples[row].demonstration.tokens for row in holdout_rows]
        return "\n".join(f"{place}. {self._shortened(tokens, DEMONSTRATION)}" for place, tokens in enumerate(shown, 1))

    def _shortened(self, tokens: Any, limit: int) -> str:
        # A token is seldom more than a few characters, and never none for long: decoding a whole long row would be wasted.
        text = self._tokenizer.decode(tokens[:limit])
        return text if len(text) <= limit and len(tokens) <= limit else f"{text[:limit]}…"


def text_of_run(host: ModuleType, config: Path, run: dict[str, Any]) -> RowText:
    """The text of the rows of a finished run.

    Args:
        host: the host's module, with `attached`.
        config: that the run was trained with.
        run: its run.json.

    Raises:
        ICAError: the config's rows are not those of the run.
    """
    callback, _ = host.attached(config, {})
    if run.get("train_rows_digest") != callback.train.digest or run["holdout_rows"] != len(callback.holdout.examples):
        raise ICAError(
            "its rows are not those of the run (another config, or data that changed since, or a run of an earlier version of this "
            "plugin), so their text would stand beside the wrong weights. Give the config and data of the run, or leave --config out."
        )
    return RowText(callback)
