"""What a scoring costs: the tokens of each row, a bar over them, and a line early on that says how long it will take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm
from transformers import Trainer

from ..config import ICAConfig
from ..data.holdout import Holdout
from ..data.store import Rows
from ..expression import parse_score, parts_of
from ..log import get_logger
from ..policy.engine import Progress
from ..scorers import needs_of

# A backward costs at least as much as its forward, so a training step at least this many forwards.
FORWARDS_PER_STEP = 2
# Seconds of scoring after which its speed is believed; its first forward, which may have to warm up, does not count.
SECONDS_TO_MEASURE = 5.0
# A scoring below this many seconds is not worth a line, and above this share of the run cheaper settings are named.
WORTH_A_LINE, DEAR = 60.0, 0.25
# Scorers that read the log-probs of rows without demonstrations, which `ica` has already.
OF_BASE = {"likelihood", "irm", "rho", "lossdiff"}


def tokens_of_rows(
    config: ICAConfig, train: Rows, holdout: Holdout, rows: list[int], demonstrations: list[list[int]]
) -> np.ndarray:
    """How many tokens the scorers read for each row, as they report their progress; shared prefixes count each time.

    Exact for `ica` and `likelihood`; where `score_tokens` cuts a row of several turns, or one side of a pair alone, a little too many.

    Args:
        config: `score`, `score_tokens`, `drop_tokens`.
        train: every train row.
        holdout: whose rows are shown.
        rows: n indices of train rows.
        demonstrations: of each.

    Returns:
        int64 [n]; 0 where a row cannot be scored.
    """
    sides, sets = train.lengths.shape[1], len(holdout.sets)
    own = train.lengths[rows].sum(axis=1)
    if config.score_tokens is not None:
        own = own - np.maximum(train.supervised[rows] - sides * config.score_tokens, 0)
    lengths = np.array([len(row.demonstration.tokens) for row in holdout.examples], int)
    shown = sides * np.array([int(lengths[of_row].sum()) for of_row in demonstrations], int)
    names = set(parts_of(parse_score(config.score)))
    needs = needs_of(names).values()
    ica = "ica" in names or config.drop_tokens is not None
    passes = 2 * sets * ica + ("ica" not in names and bool(names & OF_BASE)) + any(need.reference for need in needs)
    passes += sets * sum(need.gradients or need.trained_adapter for need in needs) + sets * ("rds" in names)
    tokens = passes * own + ica * shown
    if "one_shot" in names:  # the row is shown before each of its holdout rows
        tokens = tokens + shown + own * np.array([len(of_row) for of_row in demonstrations])
    return tokens * train.can_be_scored[rows]


def shared_tokens(holdout: Holdout, sides: int, demonstrations: list[list[int]]) -> int:
    """Tokens of demonstrations that a forward need not read again, since the row before is shown the same first ones."""
    lengths = [len(row.demonstration.tokens) for row in holdout.examples]
    saved, before = 0, list[int]()
    for of_row in sorted(demonstrations):
        saved += (sides - 1) * sum(lengths[d] for d in of_row)
        for known, d in zip(before, of_row, strict=False):
            if known != d:
                break
            saved += lengths[d]
        before = of_row
    return saved


def described(seconds: float, training_seconds: float, config: ICAConfig) -> str:
    """The line for a person: minutes of scoring, its share of the run, and what would be cheaper where that is over a quarter.

    Args:
        seconds: of the whole scoring.
        training_seconds: of the whole run without it; 0 where nothing is trained.
        config: what is not set to its cheaper value already is named.
    """
    line = f"scoring will take about {seconds / 60:.0f} minutes"
    share = seconds / (seconds + training_seconds)
    if not training_seconds:
        return f"{line}."
    line = f"{line}, {100 * share:.0f} % of the run."
    cheaper = {
        "`k: 1`": config.k > 1,
        "`retrieval_groups: 8`": config.retrieval_groups is None,
        "`score_tokens: 64`": config.score_tokens is None,
        "`budget: 0.1`": config.score == "ica" and config.drop_tokens is None and len(config.sets) == 1,
    }
    names = [name for name, possible in cheaper.items() if possible]
    if share <= DEAR or not names or not config.shows_demonstrations:
        return line
    return f"{line} Cheaper: {', '.join(names)}; see docs/scoring.md for what each loses."


class Cost:
    """Takes the progress of one scoring, moves a bar, and tells once how long it will take.

    Args:
        bar: over tokens.
        training: tokens that training costs for each token that a forward of this scoring computes; see `watched`.
        config: the block.
    """

    def __init__(self, bar: tqdm, training: float, config: ICAConfig):
        self._bar, self._training, self._config = bar, training, config
        self._began, self._done, self._told = 0.0, 0, False

    def __call__(self, tokens: int) -> None:
        """`tokens` more were read."""
        self._bar.update(tokens)
        now = time.monotonic()
        if not self._began:
            self._began = now
            return
        self._done += tokens
        if self._told or now - self._began < SECONDS_TO_MEASURE or self._bar.total is None:
            return
        self._told = True
        seconds = self._bar.total * (now - self._began) / self._done
        if seconds >= WORTH_A_LINE:
            get_logger().info("%s", described(seconds, seconds * self._training, self._config))


@contextmanager
def watched(
    trainer: Trainer, config: ICAConfig, train: Rows, holdout: Holdout, rows: list[int], demonstrations: list[list[int]]
) -> Iterator[Progress]:
    """Around a scoring of `rows`: a bar over its tokens on the local main process, and a line on how long it will take.

    Training is compared by forwards: its tokens times `FORWARDS_PER_STEP`, at the speed of the scoring's own forwards.

    Yields:
        what scorers call with the number of tokens done.
    """
    total = int(tokens_of_rows(config, train, holdout, rows, demonstrations).sum())
    sides = train.lengths.shape[1]
    computed = total - shared_tokens(holdout, sides, demonstrations) if "ica" in parts_of(parse_score(config.score)) else total
    args = trainer.args
    places = trainer.state.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size
    trained = places * float(train.lengths.sum(axis=1).mean())
    with tqdm(
        total=total,
        desc="ICA scoring",
        unit="tok",
        unit_scale=True,
        leave=False,
        disable=args.disable_tqdm or not trainer.is_local_process_zero(),
    ) as bar:
        bar.total = total  # a bar that is not shown forgets it
        yield Cost(bar, FORWARDS_PER_STEP * trained / max(computed, 1), config)
