"""The weight of every supervised token, from its refresh to the batch that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..data.matching import places_of_tokens
from ..data.store import Rows
from ..log import get_logger


class TokenWeights:
    """Which supervised tokens of every train row stay in the loss, and by what they are multiplied; alike on every rank.

    Args:
        train: every train row, SFT.

    Attributes:
        scale: float32 [rows], of the kept tokens.
        limit: the threshold that stands, NaN before there is one.
        calibrated: scored rows of the run when it was found.
    """

    def __init__(self, train: Rows):
        self._train = train
        self._starts = np.append(0, np.cumsum(train.supervised))
        self._kept = np.ones(int(self._starts[-1]), bool)
        self.scale = np.ones(len(train), np.float32)
        self.limit, self.calibrated = np.nan, 0
        self._told = False

    def give(self, rows: np.ndarray, kept: list[np.ndarray], scale: float) -> None:
        """Take over what a refresh made.

        Args:
            rows: int64 [n].
            kept: of each, bool [supervised tokens].
            scale: of all of them.
        """
        for row, values in zip(rows.tolist(), kept, strict=True):
            self._kept[self._starts[row] : self._starts[row + 1]] = values
        self.scale[rows] = scale

    def kept_of(self, row: int) -> np.ndarray:
        """bool [supervised tokens] of a row."""
        return self._kept[self._starts[row] : self._starts[row + 1]]

    def of_batch(self, rows: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The factor of each token of a batch; a token without supervision, or of no row, has one that reaches nothing.

        A line that does not hold its row's tokens as the collator returned them alone is trained whole, which is said once.

        Args:
            rows: int64 [B] or [B, T] row ids, as `data.row_ids.RowIdCollator` adds them.
            inputs: the batch, with `input_ids` [B, T].

        Returns:
            float32 [B, T].
        """
        ids, tokens = rows.cpu().numpy(), inputs["input_ids"].cpu().numpy()
        mask = inputs.get("attention_mask")
        real = mask.cpu().numpy() != 0 if mask is not None and mask.dim() == 2 else np.full(len(tokens), None)
        table = np.ones(tokens.shape, np.float32)
        for line, of_line in enumerate(ids):
            if np.ndim(of_line) == 0:
                of_row = self._of_row(int(of_line))
                places = places_of_tokens(tokens[line], self._train[int(of_line)].sequences[0].tokens, real[line])
                if places is None:
                    self._tell(int(of_line))
                else:
                    table[line, places >= 0] = of_row[places[places >= 0]]
                continue
            for row in np.unique(of_line[of_line >= 0]).tolist():
                here = np.flatnonzero(of_line == row)
                # A packed row stands whole, from its first token on; one that is drawn more often may stand in a line twice.
                table[line, here] = np.resize(self._of_row(row), len(here))
        return torch.from_numpy(table)

    def _tell(self, row: int) -> None:
        if not self._told:
            get_logger().warning(
                "drop_tokens: a batch holds row %d with other tokens than the collator returned for it alone, so that it is not known which "
                "of them to leave out; it is trained whole, and so is every such row.",
                row,
            )
        self._told = True

    def _of_row(self, row: int) -> np.ndarray:
        """float32 [tokens]: the factor of each token of a row."""
        scored = self._train[row].sequences[0].scored
        factors = np.ones(len(scored), np.float32)
        factors[scored] = self.scale[row] * self.kept_of(row)
        return factors

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, by name: a bit for each supervised token."""
        return {
            "kept_tokens": torch.from_numpy(np.packbits(self._kept)),
            "token_scale": torch.from_numpy(self.scale),
            "token_limit": torch.tensor([self.limit, self.calibrated], dtype=torch.float64),
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `tensors` returned."""
        self._kept = np.unpackbits(tensors["kept_tokens"].numpy(), count=len(self._kept)).astype(bool)
        self.scale = tensors["token_scale"].numpy().copy()
        limit, calibrated = tensors["token_limit"].tolist()
        self.limit, self.calibrated = limit, int(calibrated)
