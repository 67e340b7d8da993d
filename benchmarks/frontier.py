"""What scoring costs, and what each cheaper way loses: demonstrations per row, how they are found, and `score_tokens`.

    python benchmarks/frontier.py noise --model SmolLM2-135M-Instruct --data data --rows 96

The rows are those of benchmarks/evidence.py, and the score is `ica + likelihood`. Tokens are exact: those of the engine's forwards,
and, with `retrieval: policy`, of the prompts that it embeds; those of the holdout, once for any number of rows, are told apart. An epoch is a forward and a backward of twice a forward's work over every
token of the rows, so three times their tokens. Seconds are CPU seconds; those of fewer scored tokens are by their share of tokens.
Writes docs/benchmarks/frontier-<experiment>.md, .png and .json, anew after each way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from evidence import EXPERIMENTS, Experiment, _dataset, auroc, clock
from ica_plugin import attach
from ica_plugin.config import parse_config
from ica_plugin.policy.engine import Engine
from ica_plugin.policy.trees import grow
from ica_plugin.run.scoring import Scoring
from ica_plugin.scorers import total_score
from ica_plugin.scorers.in_context import beginning, in_context
from scoring import DOCS, Training, machine_name

WAYS: dict[str, dict[str, Any]] = {
    f"{name}, k {k}": {"k": k, **keys}
    for k in (3, 1)
    for name, keys in {
        "own": {},
        "8 groups": {"retrieval_groups": 8},
        "1 group": {"retrieval_groups": 1},
        "random": {"retrieval": "random"},
    }.items()
}
SCORED = (16, 32, 64, None)
SCORE = "ica + likelihood"
# A backward is twice a forward.
FORWARDS_PER_EPOCH = 3


def forward_tokens(engine: Engine, sequences: list) -> int:
    """Tokens that the engine's forwards over these sequences compute, shared prefixes once."""
    needed = np.array([int(s.scored.sum()) for s in sequences])
    batches = engine.path.split([s.tokens for s in sequences], needed, engine.budget)
    return sum(len(grow([sequences[i].tokens for i in batch]).tokens) for batch in batches)


class Frontier:
    """Scores of the first `count` rows of a run, by every way.

    Args:
        scoring: of the run.
        count: rows.
        good: bool [rows], what a score should put first.
    """

    def __init__(self, scoring: Scoring, count: int, good: np.ndarray):
        self.scoring, self.engine = scoring, scoring.engine
        self.rows, self.good = list(range(count)), good[:count]
        self.examples = [scoring.train[row] for row in self.rows]
        self._embedded: dict[bytes, np.ndarray] = {}
        self.epoch_tokens = FORWARDS_PER_EPOCH * sum(len(row.demonstration.tokens) for row in self.examples)
        self.epoch_seconds = self._epoch_seconds()
        begin = clock()
        self.alone = self._tokens([row.demonstration for row in self.examples])
        self.alone_seconds = clock() - begin

    def _tokens(self, sequences: list) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        self.engine.logprobs(sequences, tokens=found)
        return found

    def _epoch_seconds(self, steps: int = 4) -> float:
        """CPU seconds of training on all rows, from some steps."""
        training = Training(self.engine.model, self.examples, 4)
        some, begin = training.batches[:steps], clock()
        for batch in some:
            training.run(batch)
        return (clock() - begin) / sum(map(training.tokens, some)) * sum(map(training.tokens, training.batches))

    def _embed(self, sequences: list) -> np.ndarray:
        new = {s.prompt.tobytes(): s for s in sequences if s.prompt.tobytes() not in self._embedded}
        if new:
            self._embedded.update(zip(new, self.engine.embeddings(list(new.values())), strict=True))
        return np.stack([self._embedded[s.prompt.tobytes()] for s in sequences])

    def points(self, way: str) -> list[dict[str, Any]]:
        """One point for each number of scored tokens."""
        config = parse_config({"holdout": "rows", "score": SCORE, **WAYS[way]})
        shown = self.scoring.find_demonstrations(self.rows, config, embed=self._embed)
        holdout = [row.demonstration for row in self.scoring.holdout.examples]
        # Prompts are embedded once for all ways here, in a run once for its own.
        embedded = sum(len(row.demonstration.prompt) for row in self.examples) if config.retrieval == "policy" else 0

        def sequences(most: int | None) -> tuple[list, list]:
            rows = [beginning(row, most).demonstration for row in self.examples]
            return rows, [in_context(row, [holdout[d] for d in of_row]) for row, of_row in zip(rows, shown, strict=True)]

        begin = clock()
        after = self._tokens(sequences(None)[1])
        seconds = clock() - begin + self.alone_seconds
        whole = forward_tokens(self.engine, sum(sequences(None), []))
        found = []
        for most in SCORED:
            parts = {
                "ica": np.array([c[:most].sum() - b[:most].sum() for b, c in zip(self.alone, after, strict=True)]),
                "likelihood": np.array([b[:most].mean() for b in self.alone]),
            }
            tokens = forward_tokens(self.engine, sum(sequences(most), []))
            of_all = (tokens + embedded) / whole
            found.append(
                {
                    "way": way,
                    "score_tokens": most,
                    "tokens": (tokens + embedded) / self.epoch_tokens,
                    "seconds": seconds * of_all / self.epoch_seconds,
                    "scores": total_score(config, parts).tolist(),
                }
            )
        return found


def with_quality(points: list[dict[str, Any]], good: np.ndarray) -> list[dict[str, Any]]:
    """AUROC of the good rows, with its standard error over draws of the rows, and rank correlation with the first way's whole rows."""
    full = next(point["scores"] for point in points if point["score_tokens"] is None)
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(good), len(good)) for _ in range(200)]

    def area(scores: np.ndarray, index: np.ndarray) -> float:
        order = np.concatenate([scores[index][good[index]], scores[index][~good[index]]])
        return auroc(order, int(good[index].sum()))

    everything = np.arange(len(good))
    for point in points:
        scores = np.array(point["scores"])
        point["auroc"] = area(scores, everything)
        # Against the full score on the same draws: what both gain or lose by the rows drawn is no difference between them.
        point["error"] = float(np.std([area(scores, draw) - area(np.array(full), draw) for draw in draws]))
        point["spearman"] = float(spearmanr(scores, full).statistic)
    return points


def report(points: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The page."""
    lines = [
        f"# What scoring costs, and what it is worth: {about['experiment']}",
        "",
        f"`benchmarks/frontier.py {about['experiment']}`, {about['model']}, float32, {about['rows']} rows of {about['row_tokens']:.0f} "
        f"tokens ({about['supervised']:.0f} supervised), {about['holdout']} holdout rows, seed {about['seed']}, score `{SCORE}`, "
        f"on {about['machine']}. Cost is the share of a training epoch, in tokens (exact) and in CPU seconds (one measurement). "
        f"AUROC is of the {about['good']} rows against the others; ± is the standard error of its difference to the first way with whole "
        "rows, over draws of the rows. Spearman is with that same score. `retrieval: policy` (all but random) embeds the holdout's "
        f"{about['holdout_prompts']} prompt tokens besides, once for any number of rows; they are not counted.",
        "",
        "| demonstrations | `score_tokens` | tokens / epoch | seconds / epoch | AUROC | Spearman |",
        "|---|---|---|---|---|---|",
    ]
    for point in points:
        lines.append(
            f"| {point['way']} | {point['score_tokens'] or 'null'} | {point['tokens']:.2f} | {point['seconds']:.2f} | "
            f"{point['auroc']:.3f} ± {point['error']:.3f} | {point['spearman']:.2f} |"
        )
    return "\n".join([*lines, "", f"![cost and quality]({about['picture']})", ""])


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Cost against both measures of quality."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for way in dict.fromkeys(point["way"] for point in points):
        mine = [point for point in points if point["way"] == way]
        for axis, measure in zip(axes, ("auroc", "spearman"), strict=True):
            axis.plot([p["tokens"] for p in mine], [p[measure] for p in mine], marker="o", markersize=4, label=way)
    for axis, title in zip(axes, ("AUROC of good rows", "Spearman with the full score"), strict=True):
        axis.set_xlabel("tokens of scoring / tokens of an epoch")
        axis.set_title(title)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=[name for name in EXPERIMENTS if name in ("noise", "off-target")])
    parser.add_argument("--model", required=True), parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=96), parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the first is the full score")
    args = parser.parse_args()
    args.scale, args.batch = 1, 4
    experiment = Experiment(args.experiment, args, args.seed)
    trainer = experiment.trainer()
    trainer.model.float()
    scoring: Scoring = attach(trainer, experiment.block({}), holdout=_dataset(experiment.rows.holdout)).scoring
    good = experiment.kinds == experiment.rows.good
    frontier = Frontier(scoring, min(args.rows, len(scoring.train)), good)
    file = DOCS / f"frontier-{args.experiment}.md"
    about = {
        "experiment": args.experiment,
        "model": Path(args.model).name,
        "rows": len(frontier.rows),
        "row_tokens": np.mean([len(row.demonstration.tokens) for row in frontier.examples]),
        "supervised": np.mean([row.supervised_tokens for row in frontier.examples]),
        "holdout": len(scoring.holdout.examples),
        "holdout_prompts": sum(len(row.demonstration.prompt) for row in scoring.holdout.examples),
        "seed": args.seed,
        "good": experiment.rows.good,
        "machine": f"{machine_name()}, {torch.get_num_threads()} thread",
        "picture": file.with_suffix(".png").name,
    }
    points: list[dict[str, Any]] = []
    for way in args.ways:
        points = with_quality([*points, *frontier.points(way)], frontier.good)
        file.with_suffix(".json").write_text(json.dumps({"about": about, "points": points}, indent=1, default=float))
        file.write_text(report(points, about))
        plot(points, file.with_suffix(".png"))
        for point in points[-len(SCORED) :]:
            print({key: value for key, value in point.items() if key != "scores"}, flush=True)


if __name__ == "__main__":
    main()
