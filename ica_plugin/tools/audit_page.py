"""The page of `ica-plugin audit`: its numbers as pictures, tables and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .measures import DECILE
from .page import RowTable, Section, picture

Numbers = dict[str, Any]


def sections(numbers: Numbers) -> list[Section]:
    """The sections of the page for what `audit_numbers` returns."""
    chance = _chance(numbers["data"]["rows in the sample"])
    return [
        Section("The data", rows=[{"": name, "value": value} for name, value in numbers["data"].items()]),
        *_of_scores(numbers, chance),
        Section(
            "Sensitivity of ICA",
            f"ICA as the config has it against ICA with another choice. {chance}",
            rows=numbers["sensitivity"],
        ),
        *_of_noise(numbers),
    ]


def row_table(rows: list[dict[str, Any]]) -> RowTable:
    """The sample's rows to search and sort."""
    return RowTable(
        rows,
        "The sample, best first by the config's own score. `row` is the index into the trainer's train rows; `weight` is among the sample "
        "alone. Read the last ones.",
    )


def _chance(count: int) -> str:
    return (
        f"Chance is 0 ± {2 / np.sqrt(count - 1):.2f} (two standard deviations) for the rank correlation of {count} rows, and 0.1 for "
        f"the shared tenths, which are {max(1, round(DECILE * count))} rows each."
    )


def _of_scores(numbers: Numbers, chance: str) -> list[Section]:
    values = {name: finite for name, column in numbers["values"].items() if len(finite := _finite(column))}
    missing = [name for name in numbers["values"] if name not in values]
    return [
        Section(
            "Score distributions",
            "Seconds are of one scorer alone; together they share forwards."
            + (f" Without any finite score: {', '.join(missing)}." if missing else ""),
            picture(_distributions(values)) if values else "",
            numbers["scores"],
        ),
        Section(
            "Agreement of the scorers",
            f"Rank correlation over the sample. {chance}",
            picture(_matrix(numbers), (6.5, 5.5)),
            numbers["agreement"],
        ),
        Section(
            "Agreement with exact influence",
            f"Row gradient · holdout gradient over the adapter. {chance}"
            if numbers["influence"]
            else "Not computed: influence takes gradients over an adapter's parameters, and it is not among the scorers, or the run "
            "trains the whole model.",
            rows=numbers["influence"],
        ),
    ]


def _of_noise(numbers: Numbers) -> list[Section]:
    if not numbers["noise"] and not numbers["noise left out"]:
        return []
    text = "AUROC for a clean row against corrupted copies: 1 ranks every clean row above, below chance it prefers the corrupted."
    text += " Chance is given with two standard deviations."
    for kind, found in numbers["noise left out"].items():
        text += f" Left out: {kind}, which only {found} of the planted rows allow; plant more."
    found = [Section("Planted noise", text, picture(_auroc(numbers)) if numbers["noise"] else "", numbers["noise"])]
    if numbers["tokens"]:
        found.append(
            Section(
                "Altered tokens",
                "AUROC of an untouched token against an altered one, by its log-prob after the demonstrations, without them, and by their "
                "difference: what `drop_tokens` can see.",
                rows=numbers["tokens"],
            )
        )
    return found


def _finite(column: list[float]) -> np.ndarray:
    scores = np.array(column)
    return scores[np.isfinite(scores)]


def _distributions(values: dict[str, np.ndarray]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        scaled = [(column - column.mean()) / (column.std() or 1) for column in values.values()]
        axes.violinplot(scaled, showmedians=True, widths=0.8)
        axes.set_xticks(range(1, len(values) + 1), list(values), rotation=20, fontsize=8)
        axes.set_ylabel("score, standard deviations")

    return draw


def _matrix(numbers: Numbers) -> Callable[[Any], None]:
    names = list(numbers["values"])
    grid = np.eye(len(names))
    for line in numbers["agreement"]:
        i, j = names.index(line["scorer"]), names.index(line["with"])
        grid[i, j] = grid[j, i] = np.nan if line["rank correlation"] is None else line["rank correlation"]

    def draw(axes: Any) -> None:
        axes.imshow(grid, vmin=-1, vmax=1, cmap="RdBu")
        axes.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        for i in range(len(names)):
            for j in range(len(names)):
                dark = abs(grid[i, j]) > 0.6  # of the map's cells, so that the number can be read on it
                axes.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")

    return draw


def _auroc(numbers: Numbers) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        kinds = [line["corruption"] for line in numbers["noise"]]
        for name in numbers["values"]:
            points = [np.nan if line[name] is None else line[name] for line in numbers["noise"]]
            axes.plot(kinds, points, "o", label=name)
        axes.axhline(0.5, color="grey", linewidth=0.8)
        axes.set(ylabel="AUROC", ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=8, ncols=4)

    return draw
