"""The page of `ica-plugin report`: its numbers as verdicts, a table of rows, and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from .page import RowTable, Section, Verdict, duration, picture
from .row_text import RowText

Numbers = dict[str, Any]

MOST_ROWS = 2000  # in the table: a browser searches and sorts so many without waiting
DEAR = 0.25  # scoring over training from which the cheaper settings are named
# Of the scores file, what the table has already or a reader has no use for.
KNOWN_COLUMNS = {"row", "refresh", "step", "score", "weight", "tokens", "demos", "draws", "source", "dropped_tokens"}


def verdicts(numbers: Numbers) -> list[Verdict]:
    """What a reader should know first."""
    return [*_helped(numbers), _trained(numbers), _cost(numbers["run"]), *_moved(numbers)]


def _helped(numbers: Numbers) -> list[Verdict]:
    found = numbers.get("against")
    if found is None:
        return [
            Verdict(
                "Whether it helped is not known here.",
                "Train the same config without the block, with the same test rows, and give that run's folder as --against.",
            )
        ]
    gain = found["loss without"] - found["loss"]
    return [
        Verdict(
            f"The evaluation loss is {abs(gain):.4f} {'lower' if gain > 0 else 'higher'} than without the block: {found['loss']:.4f} "
            f"against {found['loss without']:.4f} at step {found['step']}.",
            "One run each. How far chance goes is what the loss differs by between two runs that differ in nothing but `seed`: train both "
            "once more with another seed before you trust a small difference.",
        )
    ]


def _trained(numbers: Numbers) -> Verdict:
    run, last = numbers["run"], numbers["refreshes"][-1]
    if not numbers["trained"]:
        return Verdict(
            f"Every row was trained, with a weight from {last['weight min']:.2g} to {last['weight max']:.2g}.",
            f"As `{run['weighting']}` of `{run['score']}` gives them; effective sample size {last['effective sample size']:.0%}. Without the "
            "block every weight is 1.",
        )
    counts = {line["trained"]: line["rows"] for line in numbers["trained"]}
    often = counts["twice"] + counts["more often"]
    return Verdict(
        f"Of {sum(counts.values())} rows: {counts['never']} never trained, {counts['once']} once, {often} more often.",
        f"Drawn by `{run['weighting']}` of `{run['score']}` in {run['steps']} steps. Without the block every row is trained once an epoch.",
    )


def _cost(run: dict[str, Any]) -> Verdict:
    cheaper = ""
    if run["overhead"] is not None and run["overhead"] > DEAR:
        cheaper = " Cheaper: `k: 1`, `retrieval: random` with `retrieval_groups: 8`, a longer `refresh_interval`, or a `budget`."
    share = "" if run["overhead"] is None else f", {run['overhead']:.0%} of the training time"
    return Verdict(
        f"Scoring took {duration(run['scoring seconds'])}{share}.",
        f"{run['scored rows']} scorings of {run['rows']} rows in {run['refreshes']} refreshes.{cheaper}",
    )


def _moved(numbers: Numbers) -> list[Verdict]:
    found = []
    rows = numbers["rows"]
    unscored = sum(row["score"] != row["score"] for row in rows)
    if unscored:
        found.append(
            Verdict(f"{unscored} rows have no score.", "No demonstration fits the model's context beside them; they weigh 1.")
        )
    scores = np.array([row["score"] for row in rows])
    finite = scores[np.isfinite(scores)]
    if len(finite) > 1 and np.ptp(finite) == 0:
        found.append(
            Verdict(
                "Every row has the same score, so nothing was reweighted.",
                "`ica-plugin audit` shows which scorers tell rows apart.",
            )
        )
    first, last = (np.array([row[name] for row in rows]) for name in ("first weight", "weight"))
    if len(numbers["refreshes"]) > 1 and np.ptp(first) and np.ptp(last):
        correlation = float(np.corrcoef(first, last)[0, 1])
        found.append(
            Verdict(
                f"Between a row's first and last scoring weights correlate at {correlation:.2f}.",
                "Near 1 the refreshes changed little, and a longer `refresh_interval` costs less for the same.",
            )
        )
    return found


def row_table(rows: list[dict[str, Any]], table: dict[str, list], text: RowText | None) -> RowTable:
    """The rows by weight, with what each scorer said of them last and, where it is known, their text.

    Args:
        rows: of the report's numbers, the highest weight first.
        table: the columns of scores.parquet.
        text: of the rows.
    """
    newest = {row: index for index, row in enumerate(table["row"])}  # the last line of a row is its newest
    moved, drawn = any(row["change"] for row in rows), any(row["times trained"] for row in rows)
    hidden = {*(() if moved else ("first weight", "change")), *(() if drawn else ("times trained",))}
    scorers = [name for name in table if name not in KNOWN_COLUMNS and any(value is not None for value in table[name])]
    half = MOST_ROWS // 2
    shown = rows if len(rows) <= MOST_ROWS else [*rows[:half], *rows[-half:]]
    about = (
        "" if len(rows) <= MOST_ROWS else f"The {half} rows of the highest and the {half} of the lowest weight, of {len(rows)}. "
    )
    if "dropped_tokens" in table:
        about += "Tokens left out of the loss are struck through. "
    about += (
        "`row` is the index into the trainer's train rows."
        if text
        else "`row` is the index into the trainer's train rows; with --config the rows' text stands here."
    )
    return RowTable(
        [
            {name: value for name, value in row.items() if name not in hidden}
            | {name: table[name][newest[row["row"]]] for name in scorers}
            | _of_text(
                text, row["row"], {name: table[name][newest[row["row"]]] for name in ("demos", "dropped_tokens") if name in table}
            )
            for row in shown
        ],
        about,
    )


def _of_text(text: RowText | None, row: int, line: dict[str, list[int] | None]) -> dict[str, Any]:
    """What a row's line of the scores file tells of its tokens, and its text where that is known."""
    dropped = line.get("dropped_tokens")
    found: dict[str, Any] = {} if dropped is None else {"tokens left out": len(dropped)}
    if text is None:
        return found
    return found | text.of_row(row, dropped or []) | {"demonstrations": text.of_demonstrations(line["demos"] or [])}


def sections(numbers: Numbers) -> list[Section]:
    """Pictures and tables for what `report_numbers` returns."""
    found = [
        Section(
            "The run",
            "Overhead is scoring seconds over training seconds.",
            rows=[{"": name, "value": value} for name, value in numbers["run"].items()],
        ),
        *([Section("How often rows were trained", rows=numbers["trained"])] if numbers["trained"] else []),
        *_of_weights(numbers),
        Section("Refreshes", "Effective sample size: (Σw)² / Σw² over the number of rows.", rows=numbers["refreshes"]),
    ]
    if numbers["gained"] or numbers["lost"]:
        found += [
            Section("Who gained", "From the first to the last scoring of the row.", rows=numbers["gained"]),
            Section("Who lost", rows=numbers["lost"]),
        ]
    return found


def _of_weights(numbers: Numbers) -> list[Section]:
    refreshes = numbers["refreshes"]
    steps = [refresh["step"] for refresh in refreshes]
    rows = numbers["rows"]

    def weights(axes: Any) -> None:
        axes.hist([row["weight"] for row in rows], bins=30)
        axes.axvline(1, color="black", linestyle=":")
        axes.set(xlabel="weight", ylabel="rows")

    def over_time(axes: Any) -> None:
        for name in (name for name in refreshes[0] if name.startswith("weight q")):
            axes.plot(
                steps,
                [refresh[name] for refresh in refreshes],
                marker="o",
                markersize=3,
                label=f"{name.removeprefix('weight q')}% quantile",
            )
        axes.set(xlabel="optimizer step", ylabel="weight")
        axes.legend(frameon=False, fontsize=8)

    def sample_size(axes: Any) -> None:
        axes.plot(steps, [100 * refresh["effective sample size"] for refresh in refreshes], marker="o", markersize=3)
        axes.set(xlabel="optimizer step", ylabel="effective sample size, %", ylim=(0, 102))

    def distribution(axes: Any) -> None:
        axes.scatter([row["score"] for row in rows], [row["weight"] for row in rows], s=8, alpha=0.6)
        axes.set(xlabel="last score", ylabel="last weight")

    if len(refreshes) == 1:
        given = [Section("Weights", "Rows by their weight; 1 is no weighting.", picture(weights))]
    else:
        text = "Quantiles of the weights given at each refresh; 1 is no weighting."
        given = [
            Section("Weights over time", text, picture(over_time)),
            Section("Effective sample size", "As a share of the rows: 100 % when all weights are equal.", picture(sample_size)),
        ]
    return [*given, Section("Scores and weights", picture=picture(distribution))]
