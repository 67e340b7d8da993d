"""One spoilt row with its dropped tokens, as a picture: docs/evidence/tokens.png.

    python benchmarks/token_picture.py --model SmolLM2-135M-Instruct --data <folder of the data files>

The row is the one with most dropped tokens among those of `noise`, seed 0, whose numbers were altered.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

from evidence import Experiment, _dataset
from evidence_page import FOLDER
from ica_plugin import attach
from ica_plugin.data.scores import read_scores
from ica_plugin.scorers.in_context import in_context

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

WIDTH = 78  # characters of a line


def draw(pieces: list[tuple[str, float, bool]], limit: float, file: Path) -> None:
    """Draw tokens in lines, darker the less likely.

    Args:
        pieces: (text, log-prob in nats, whether it is dropped) of each token.
        limit: the threshold.
        file: of the picture.
    """
    placed, line, column = [], 0, 0
    for text, value, gone in pieces:
        shown = text.replace("\n", "↵")
        if column + len(shown) > WIDTH:
            line, column = line + 1, 0
        placed.append((line, column, shown, value, gone))
        column += len(shown)
        if "\n" in text:
            line, column = line + 1, 0
    figure, axes = plt.subplots(figsize=(9, 0.32 * (line + 2)))
    for at, start, shown, value, gone in placed:
        shade = float(np.clip(value / limit, 0, 1))
        axes.barh(at, len(shown), left=start, height=0.9, color=plt.cm.Oranges(0.75 * shade), linewidth=0)
        for place, character in enumerate(shown):
            axes.text(start + place + 0.5, at, character, ha="center", va="center", family="monospace", fontsize=9)
        if gone:
            axes.plot([start, start + len(shown)], [at, at], color="black", linewidth=2)
    axes.set(xlim=(0, WIDTH), ylim=(line + 0.6, -0.6))
    axes.set_axis_off()
    figure.tight_layout(pad=0.2)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True), parser.add_argument("--data", required=True)
    args = parser.parse_args()
    args.batch, args.scale = 4, 1
    experiment = Experiment("noise", args, 0)
    trainer = experiment.trainer()
    block = {"score": "ica", "weighting": "rank", "apply": "gradient", "drop_tokens": "auto"}
    callback = attach(trainer, block, holdout=_dataset(experiment.rows.holdout))
    altered = np.flatnonzero(experiment.kinds == "altered numbers").tolist()
    callback.refresh(altered, shared=True)  # the threshold is the holdout's, whatever rows are scored
    lines = {line["row"]: line for line in read_scores(callback.files.folder / "scores.parquet").to_pylist()}
    row = max(altered, key=lambda one: len(lines[one]["dropped_tokens"]))
    sequence, dropped = callback.train[row].sequences[0], set(lines[row]["dropped_tokens"])
    shown = [callback.holdout.examples[demo].demonstration for demo in lines[row]["demos"]]
    values: list[np.ndarray] = []
    callback.scoring.engine.logprobs([in_context(sequence, shown)], tokens=values)
    at = np.flatnonzero(sequence.scored)
    pieces = [
        (experiment.tokenizer.decode(sequence.tokens[[place]]), float(value), place in dropped)
        for place, value in zip(at.tolist(), values[0], strict=True)
    ]
    draw(pieces, callback.state.tokens.limit, FOLDER / "tokens.png")
    prompt = next(message["content"] for message in experiment.rows.train[row]["prompt"])
    print(prompt, "".join(text for text, _, _ in pieces), f"{len(dropped)} of {len(pieces)} tokens dropped", sep="\n")


if __name__ == "__main__":
    main()
