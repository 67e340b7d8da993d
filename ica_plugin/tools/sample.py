"""One policy and one sample of rows, scored in several ways: as the config has it, otherwise, and beside corrupted copies."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from ..data.holdout import Holdout
from ..data.store import Example, Rows, Sequence
from ..expression import parse_score, parts_of
from ..log import get_logger
from ..run.callback import ICACallback
from ..scorers import balanced_score, scores_for_sets
from ..scorers.context import ScoringContext
from ..scorers.in_context import in_context
from .measures import agreement, auroc
from .noise import corrupted

FEWEST_PLANTED = 5

Columns = dict[str, np.ndarray]


class Sample:
    """Rows of a run, and what the scorers say of them.

    Args:
        callback: of the run.
        rows: indices of train rows.

    Attributes:
        columns: scores of the sample by scorer and holdout set, as far as they were asked for.
        seconds: what each scorer took by itself.
        demonstrations: what each row of the sample is shown, indices of holdout rows.
    """

    def __init__(self, callback: ICACallback, rows: list[int]):
        self.callback, self.rows = callback, rows
        self.columns: Columns = {}
        self.seconds: dict[str, float] = {}
        self.demonstrations = self._find()

    def score(self, names: list[str]) -> None:
        """Score the sample by every scorer of the sums `names`, each by itself, to tell what it costs."""
        for part in parts_in(names):
            get_logger().info("audit: %d rows by %s.", len(self.rows), part)
            begin = time.monotonic()
            self.columns |= self._score([part])
            self.seconds[part] = time.monotonic() - begin

    def total(self, name: str, columns: Columns | None = None) -> np.ndarray:
        """The one score of each row by the sum `name`, of the sample or of other rows' columns."""
        config = self.callback.config.model_copy(update={"score": name})
        return balanced_score(config, self.columns if columns is None else columns)

    def sensitivity(self) -> list[dict[str, Any]]:
        """ICA under other demonstrations, against ICA as the config has it."""
        get_logger().info("audit: ICA with other demonstrations.")
        config, holdout = self.callback.config, self.callback.holdout
        own = self.total("ica") if "ica" in self.seconds else self._ica()

        def against_own(choice: str, other: np.ndarray) -> dict[str, Any]:
            return {"ICA with": choice, **agreement(own, other)}

        found = [
            against_own(f"k = {k}", self._ica(self._find(k=k)))
            for k in sorted({1, 3, 5} - {config.k})
            if k <= min(map(len, holdout.sets.values()))
        ]
        found.append(against_own("the order turned round", self._ica([shown[::-1] for shown in self.demonstrations])))
        if config.retrieval != "random":
            found.append(against_own("demonstrations at random", self._ica(self._find(retrieval="random"))))
        bare = dataclasses.replace(holdout, examples=[_without_prompt(row) for row in holdout.examples])
        found.append(against_own("another template: answers alone, without their prompts", self._ica(holdout=bare)))
        if all(len(shown) >= 4 for shown in holdout.sets.values()):
            rng = np.random.default_rng(config.seed)
            mixed = [rng.permutation(shown).tolist() for shown in holdout.sets.values()]
            halves = [[row for shown in mixed for row in sorted(shown[half::2])] for half in (0, 1)]
            first, second = (self._ica(self._find(holdout.part(half))) for half in halves)
            found.append({"ICA with": "one half of the holdout against the other", **agreement(first, second)})
        return found

    def noise(
        self, names: list[str], planted: int, rng: np.random.Generator
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
        """AUROC of each scorer for clean rows against their corrupted copies, scored together; the same of single tokens; and the
        kinds of corruption that too few of the planted rows allow, with how many do."""
        train = self.callback.train
        # A corrupted undesirable row is rightly the better one.
        good = [i for i, row in enumerate(self.rows) if train.desirable[row]]
        picked = sorted(rng.choice(good, min(planted, len(good)), replace=False).tolist())
        clean = [train[self.rows[i]] for i in picked]
        copies, left_out = {}, {}
        for kind, of_kind in corrupted(clean, self.callback.trainer.processing_class, rng).items():
            here = {i: copy for i, copy in enumerate(of_kind) if copy is not None}
            if len(here) < FEWEST_PLANTED:
                left_out[kind] = len(here)
            else:
                copies[kind] = here
        if not copies:
            return [], [], left_out
        columns = self._score_beside(clean, picked, copies, names)
        result, start = [], len(clean)
        for kind, here in copies.items():
            rows = [*here, *range(start, start + len(here))]
            part = {name: column[rows] for name, column in columns.items()}
            chance = 2 * np.sqrt((2 * len(here) + 1) / 12) / len(here)
            result.append(
                {"corruption": kind, "rows": len(here), "chance": f"0.5 ± {chance:.2f}"}
                | {name: auroc(self.total(name, part), len(here)) for name in names}
            )
            start += len(here)
        of_tokens = [self._altered(kind, clean, picked, here) for kind, here in copies.items()]
        return result, [line for line in of_tokens if line], left_out

    def _altered(self, kind: str, clean: list[Example], picked: list[int], copies: dict[int, Example]) -> dict[str, Any]:
        """AUROC of untouched tokens against altered ones, in the copies that kept their row's length; {} where there are none."""
        kept = {
            i: (copy.sequences[0], clean[i].sequences[0])
            for i, copy in copies.items()
            if len(copy.sequences) == 1 and len(copy.sequences[0].tokens) == len(clean[i].sequences[0].tokens)
        }
        holdout, engine = self.callback.holdout.examples, self.callback.scoring.engine
        after: list[np.ndarray] = []
        alone: list[np.ndarray] = []
        shown = [[holdout[row].demonstration for row in self.demonstrations[picked[i]]] for i in kept]
        engine.logprobs([in_context(copy, of_row) for (copy, _), of_row in zip(kept.values(), shown, strict=True)], tokens=after)
        engine.logprobs([copy for copy, _ in kept.values()], tokens=alone)
        altered = [(copy.tokens != own.tokens)[copy.scored] for copy, own in kept.values()]
        if not altered or not np.concatenate(altered).any() or np.concatenate(altered).all():
            return {}
        bad = np.concatenate(altered)
        in_order = np.argsort(bad, kind="stable")
        ways = {"in context": np.concatenate(after), "without context": np.concatenate(alone)}
        ways["their difference"] = ways["in context"] - ways["without context"]
        clean_tokens = int((~bad).sum())
        return {"corruption": kind, "tokens": len(bad), "altered": int(bad.sum())} | {
            name: auroc(values[in_order], clean_tokens) for name, values in ways.items()
        }

    def _score_beside(
        self, clean: list[Example], picked: list[int], copies: dict[str, dict[int, Example]], names: list[str]
    ) -> Columns:
        """Scores of the clean rows and of all their copies at once, each shown what its clean row is: the clean ones are scored
        but once."""
        callback = self.callback
        origin = [picked[i] for i in [*range(len(clean)), *(i for here in copies.values() for i in here)]]
        train = Rows.of([*clean, *(copy for here in copies.values() for copy in here.values())])
        context = dataclasses.replace(
            callback.scoring.context([], []),
            train=train,
            rows=list(range(len(train))),
            demonstrations=[self.demonstrations[i] for i in origin],
            holdout=dataclasses.replace(
                callback.holdout, hidden_from=[callback.holdout.hidden_from[self.rows[i]] for i in origin]
            ),
        )
        kept = context.kept  # holdout adapters may stay; what was kept by row is of other rows
        context.kept = _adapter(kept) | {name: _adapter(kept[name]) for name in callback.config.sets if name in kept}
        get_logger().info("audit: planted noise, %d rows.", len(train))
        return self._score(parts_in(names), context)

    def _find(self, holdout: Holdout | None = None, **keys: Any) -> list[list[int]]:
        """The sample's demonstrations as a run would find them, whatever its score, or with other keys or holdout rows."""
        config = self.callback.config.model_copy(update={"score": "ica", **keys})
        return self.callback.scoring.find_demonstrations(self.rows, config, holdout)

    def _score(self, parts: list[str], context: ScoringContext | None = None) -> Columns:
        """Scores of the sample, or of a context's rows, computed together."""
        context = context or self.callback.scoring.context(self.rows, self.demonstrations)
        config = self.callback.config.model_copy(update={"score": " + ".join(parts), "drop_tokens": None})
        return scores_for_sets(dataclasses.replace(context, config=config))

    def _ica(self, demonstrations: list[list[int]] | None = None, **of_context: Any) -> np.ndarray:
        """ICA of the sample with other demonstrations, or with other attributes of the scoring context."""
        shown = self.demonstrations if demonstrations is None else demonstrations
        context = dataclasses.replace(self.callback.scoring.context(self.rows, shown), **of_context)
        return self.total("ica", self._score(["ica"], context))


def parts_in(names: list[str]) -> list[str]:
    """The scorers of all sums, each once."""
    return list(dict.fromkeys(part for name in names for part in parts_of(parse_score(name))))


def _adapter(kept: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kept.items() if key == "adapter"}


def _without_prompt(row: Example) -> Example:
    """The row with its (chosen) sequence from the first supervised token on."""
    # What a row shows belongs to its whole: a later turn's image tokens would stand without their pixels.
    if not row.can_be_scored or row.sequences[0].media:
        return row
    sequence = row.sequences[0]
    first = int(np.argmax(sequence.scored))
    answer = Sequence(sequence.tokens[first:], sequence.scored[first:])
    return dataclasses.replace(row, sequences=(answer, *row.sequences[1:]))
