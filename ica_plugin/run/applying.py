"""How a batch's rows get their weight: their gradients scaled, or the rows drawn by it before; and its tokens theirs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import Trainer

from ..errors import ICAError
from ..training.injection import GradientInjection
from .drawing import Drawing
from .state import RowState
from .token_weights import TokenWeights


class Applying:
    """Stands around the loss of every batch, and checks that no step is taken without weights.

    Args:
        trainer: the host's, whose model gets the hook.
        state: has the weights.
        drawing: draws rows; None where gradients are scaled.
        tokens: weights of tokens; None where no token is left out.
    """

    def __init__(self, trainer: Trainer, state: RowState, drawing: Drawing | None, tokens: TokenWeights | None = None):
        self._trainer, self._state, self._drawing, self._tokens = trainer, state, drawing, tokens
        self._injection: GradientInjection | None = None

    def begin(self, loader: Any, scores: bool) -> None:
        """Training begins, or begins over, as after auto_find_batch_size; see `Drawing.begin`."""
        self.end()
        if self._drawing is None or self._tokens is not None:
            self._injection = GradientInjection(self._trainer.model)
        if self._drawing is not None:
            self._drawing.begin(loader, scores)

    def end(self) -> None:
        """Take the hook off the model."""
        if self._injection is not None:
            self._injection.remove()
        self._injection = None

    def __call__(self, rows: torch.Tensor, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Around the loss of a batch: its rows' gradients are scaled, or, where rows are drawn, it is checked that these were; and
        the gradients of its tokens.

        Args:
            rows: int64 [B] or [B, T] row ids.
            inputs: the batch.

        Raises:
            ICAError: a row has no weight or was not drawn, or training has not begun.
        """
        if self._drawing is not None:
            self._drawing.check(rows)
            if self._tokens is None:
                return nullcontext()
        if self._injection is None:
            raise ICAError("a training step ran outside `trainer.train()`, before any row was scored.")
        weights = self._state.weights_of(rows) if self._drawing is None else torch.ones(rows.shape)
        if self._tokens is not None:
            weights = (weights[:, None] if weights.dim() == 1 else weights) * self._tokens.of_batch(rows, inputs)
        return self._injection.scaling(weights)

    def before_step(self) -> None:
        """Before an optimizer step: every gradient went through the hook; see `GradientInjection.check_gradients`."""
        if self._injection is not None:
            self._injection.check_gradients()
