"""Token weights of the evidence experiments: tokens that stay surprising after good examples are left out of the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from evidence_methods import Cut
from ica_plugin.data.store import Example, Sequence
from ica_plugin.policy.model import model_context
from ica_plugin.run.callback import ICACallback
from ica_plugin.scorers.in_context import in_context
from ica_plugin.training.injection import GradientInjection
from ica_plugin.weighting.retrieval import retrieve

HOLDOUT_ROWS = 100  # of which log-probs are taken for the threshold


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs of supervised tokens under the policy as it is before the first step.

    Attributes:
        sequences: the train rows.
        train: per train row, float [supervised tokens]; by whether they are taken in context.
        holdout: the same of holdout rows, in one.
    """

    sequences: list[Sequence]
    train: dict[bool, list[np.ndarray]]
    holdout: dict[bool, np.ndarray]


def token_logprobs(callback: ICACallback) -> TokenLogprobs:
    """Log-probs with and without demonstrations; a holdout row's demonstrations are other holdout rows."""
    rows, holdout = callback.train, callback.holdout
    engine, tokenizer = callback.scoring.engine, callback.trainer.processing_class
    mine = list(range(min(HOLDOUT_ROWS, len(holdout.examples))))
    others = retrieve(
        holdout.examples,
        replace(holdout, hidden_from=[frozenset({i}) for i in range(len(holdout.examples))]),
        callback.config,
        rows=mine,
        context=model_context(callback.trainer.model),
        embed=engine.embeddings,
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
    )

    def both(examples: list[Example], shown: list[list[int]]) -> dict[bool, list[np.ndarray]]:
        alone = [row.sequences[0] for row in examples]
        after = [
            in_context(row, [holdout.examples[i].demonstration for i in demonstrations])
            for row, demonstrations in zip(alone, shown, strict=True)
        ]
        found: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for context, sequences in ((True, after), (False, alone)):
            engine.logprobs(sequences, tokens=found[context])
        return found

    train = both(rows, callback.scoring.find_demonstrations(list(range(len(rows)))))
    of_holdout = both([holdout.examples[i] for i in mine], others)
    return TokenLogprobs(
        [row.sequences[0] for row in rows], train, {context: np.concatenate(found) for context, found in of_holdout.items()}
    )


def kept_tokens(logprobs: TokenLogprobs, cut: Cut, *, always: int) -> list[np.ndarray]:
    """Which supervised tokens of each train row stay in the loss, bool [supervised tokens] per row.

    Args:
        logprobs: of the tokens.
        cut: the threshold.
        always: a token that always stays, the end of a turn.
    """
    train = logprobs.train[cut.in_context]
    source = logprobs.holdout[cut.in_context] if cut.of_holdout else np.concatenate(train)
    threshold = np.quantile(source, cut.percent / 100)
    return [
        (values >= threshold) | (row.tokens[row.scored] == always) for values, row in zip(train, logprobs.sequences, strict=True)
    ]


def train_weighted_tokens(trainer: Any, sequences: list[Sequence], weights: list[np.ndarray]) -> None:
    """Make an SFT trainer scale the gradient of each supervised token of each row by its weight.

    Args:
        trainer: before `train()`.
        sequences: the train rows.
        weights: per row, float [supervised tokens].
    """
    by_row = {}
    for row, values in zip(sequences, weights, strict=True):
        whole = np.ones(len(row.tokens), np.float32)
        whole[row.scored] = values
        by_row[row.tokens.tobytes()] = torch.from_numpy(whole)
    injection, host_loss = GradientInjection(trainer.model), trainer.compute_loss

    def weighted_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids, real = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu().bool()
        table = torch.ones(ids.shape)
        for line, row, mask in zip(table, ids, real, strict=True):
            line[mask] = by_row[row[mask].numpy().tobytes()]
        with injection.scaling(table):
            return host_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = weighted_loss
