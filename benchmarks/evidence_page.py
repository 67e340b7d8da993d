"""Tables and pictures of the evidence, from the results of the runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from evidence_methods import BEST, SCORE, baseline_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "evidence.md"
FOLDER = PAGE.with_suffix("")
# Metric → whether less of it is better.
METRICS = {"loss": True, "margin": False, "accuracy": False}
UNSCALED = ("holdout", "test")  # by `--scale`
DIGITS = {"loss": 4, "accuracy": 3, "margin": 3}


def write_page() -> None:
    """Put each experiment's tables between its two marks in docs/evidence.md, and its picture beside its results."""
    text = PAGE.read_text()
    found = {file.stem: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}
    for name, results in found.items():
        draw(results, FOLDER / f"{name}.png")
        picture = f"![{name}: what each method changes](evidence/{name}.png)"
        text = _between(text, name, described(results), methods(results), picture, scorers(results))
    text = _between(text, "ways", ways({name: results for name, results in found.items() if name in WAYS}))
    text = _between(text, "tokens", tokens({name: found[name] for name in SFT if name in found}))
    PAGE.write_text(text)


def _between(text: str, name: str, *parts: str) -> str:
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    filled = start + "\n\n".join(["", *(part for part in parts if part), ""]) + end
    text, found = re.subn(f"{start}.*?{end}", lambda _: filled, text, flags=re.S)
    if not found:
        raise SystemExit(f"{PAGE}: no `{start}` … `{end}` to put the tables between.")
    return text


# The settings in which ways to train with weights are compared, and the metric of each.
WAYS = {"noise": "loss", "off-target": "loss", "preferences": "margin", "simpo": "margin"}


# Those of SFT; in the last two nothing is spoilt.
SFT = ("noise", "off-target", "gsm8k", "alpaca")


def tokens(found: dict[str, dict[str, Any]]) -> str:
    """Table of what leaving tokens out gains, alone and with the best half drawn, in every SFT setting."""
    names = {run["method"] for results in found.values() for run in results["runs"] if ", tokens above " in run["method"]}
    drawn = f"{SCORE['noise']}, top, drawn"
    lines = []
    for method in [drawn, *sorted(names)]:
        gained = [_gain_cell(gains(results, method, "loss"), "loss") for results in found.values()]
        left = [_left_out(results, method) for results in found.values()]
        lines.append(f"| {method} | {' | '.join(f'{gain}{share}' for gain, share in zip(gained, left, strict=True))} |")
    for method in sorted(name for name in names if name.startswith(drawn)):
        cells = [_gain_cell(gains(results, method, "loss", drawn), "loss") for results in found.values()]
        lines.append(f"| the same less the best half drawn: tokens above{method.rpartition('above')[2]} | {' | '.join(cells)} |")
    return "\n".join(
        [f"| gain in loss over no weighting (tokens left out) | {' | '.join(found)} |", "|" + "---|" * (len(found) + 1), *lines]
    )


def _left_out(results: dict[str, Any], method: str) -> str:
    shares = [run["tokens left out"] for run in _of(results, method).values() if "tokens left out" in run]
    return f", {np.mean(shares):.1%} of tokens" if shares else ""


def ways(found: dict[str, dict[str, Any]]) -> str:
    """Table of what the same weights gain as scaled gradients and as drawn rows, in every setting."""
    lines = []
    for title, method in {
        "oracle, gradients scaled": "oracle",
        "oracle, rows drawn": "oracle, drawn",
        "softmax, gradients scaled": "{score}",
        "softmax, rows drawn": "{score}, drawn",
        "rank, gradients scaled": "{score}, rank",
        "rank, rows drawn": "{score}, rank, drawn",
        "best half, gradients scaled": "{score}, top",
        "best half, rows drawn": "{score}, top, drawn",
        "best share alone, over and over": "{score}, {best} alone",
        "good rows alone, over and over": "good rows alone",
        "softmax of `ica`, gradients scaled": "ica",
    }.items():
        cells = []
        for name, results in found.items():
            cells.append(_gain_cell(gains(results, method.format(score=SCORE[name], best=BEST[name]), WAYS[name]), WAYS[name]))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for title, drawn, scaled in (
        ("oracle: drawn less scaled", "oracle, drawn", "oracle"),
        ("softmax: drawn less scaled", "{score}, drawn", "{score}"),
        ("rank: drawn less scaled", "{score}, rank, drawn", "{score}, rank"),
        ("best half: drawn less scaled", "{score}, top, drawn", "{score}, top"),
    ):
        cells = []
        for name, results in found.items():
            one, other = (method.format(score=SCORE[name]) for method in (drawn, scaled))
            cells.append(_gain_cell(gains(results, one, WAYS[name], other), WAYS[name]))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    head = [f"{name}, {WAYS[name]} (`{SCORE[name]}`)" for name in found]
    return "\n".join([f"| weights and how they act | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1), *lines])


def _gain_cell(gain: np.ndarray, metric: str) -> str:
    if not len(gain):
        return "not run"
    apart = _apart(gain)
    return (
        f"{_spread(gain, DIGITS[metric], '+')} ({f'{apart} sd, ' if apart else ''}{len(gain)} seed{'s' if len(gain) > 1 else ''})"
    )


def _apart(gain: np.ndarray) -> str:
    return f"{gain.mean() / gain.std(ddof=1):+.1f}" if len(gain) > 2 and gain.std(ddof=1) > 1e-9 else ""


def described(results: dict[str, Any]) -> str:
    """One sentence on what was run where."""
    settings = results["settings"]
    rows = ", ".join(
        f"{count * (1 if kind in UNSCALED else results['scale'])} {kind}" for kind, count in settings["rows"].items()
    )
    seeds = sorted({run["seed"] for run in results["runs"]})
    return (
        f"{results['model']} in bfloat16, LoRA r = 8 on the query and value projections, {rows} (rows of up to {settings['longest']} "
        f"tokens); batch {results['batch']}, learning rate {settings['learning_rate']:g} falling linearly to 0, one epoch; seeds "
        f"{', '.join(map(str, seeds))}; {results['machine']}, {results['threads']} thread(s)."
    )


def _of(results: dict[str, Any], method: str) -> dict[int, dict[str, Any]]:
    return {run["seed"]: run for run in results["runs"] if run["method"] == method}


def _metrics(results: dict[str, Any]) -> list[str]:
    return [metric for metric in METRICS if metric in results["runs"][0]]


def gains(results: dict[str, Any], method: str, metric: str, other: str | None = None) -> np.ndarray:
    """How much better than another method (default: no weighting at the same learning rate), over the seeds that both were
    run with: both are on the same rows, in the same order, from the same start."""
    plain, mine = _of(results, other or baseline_of(method)), _of(results, method)
    sign = -1 if METRICS[metric] else 1
    return np.array([sign * (mine[seed][metric] - plain[seed][metric]) for seed in sorted(mine.keys() & plain.keys())])


def _spread(values: np.ndarray, digits: int, sign: str = "") -> str:
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.{digits}f}{spread}"


def methods(results: dict[str, Any]) -> str:
    """Table of the methods, the best first; mean and standard deviation over seeds."""
    metrics = _metrics(results)
    names = [name for name in dict.fromkeys(run["method"] for run in results["runs"]) if name != "before"]
    names.sort(key=lambda name: np.mean([run[metrics[0]] for run in _of(results, name).values()]))
    if not METRICS[metrics[0]]:
        names.reverse()
    lines = []
    for name in ["before", *names]:
        runs = _of(results, name)
        cells = []
        for metric in metrics:
            cells.append(_spread(np.array([run[metric] for run in runs.values()]), DIGITS[metric]))
            gain = gains(results, name, metric)
            shown = name != "before" and name != baseline_of(name) and len(gain)
            cells += [_spread(gain, DIGITS[metric], "+"), _apart(gain)] if shown else ["", ""]
        seconds = (
            [""] * 2
            if name == "before"
            else [f"{np.mean([run[key] for run in runs.values()]):.0f}" for key in ("seconds", "scoring seconds")]
        )
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {seconds[0]} | {seconds[1]} |")
    head = " | ".join(f"{metric} | gain over no weighting | in standard deviations" for metric in metrics)
    columns = 3 * len(metrics) + 4
    return "\n".join([f"| method | seeds | {head} | run, s | of it scoring, s |", "|" + "---|" * columns, *lines])


def scorers(results: dict[str, Any]) -> str:
    """Table of the scores: AUROC of a good row against each bad kind, seconds, and agreement over seeds."""
    if not results["scores"]:
        return ""
    kinds = list(results["scores"][0]["auroc"])
    stability = {line["scorer"]: line["stability"] for line in results.get("stability", [])}
    head = [
        *(f"AUROC against {kind}" for kind in kinds),
        "seconds, alone",
        *(["same rows, another holdout: rank correlation"] if stability else []),
    ]
    lines = []
    for name in dict.fromkeys(line["scorer"] for line in results["scores"]):
        mine = [line for line in results["scores"] if line["scorer"] == name]
        cells = [_spread(np.array([line["auroc"][kind] for line in mine]), 2) for kind in kinds]
        seconds = [line["seconds"] for line in mine if line["seconds"] is not None]
        cells.append(f"{np.mean(seconds):.0f}" if seconds else "")
        if stability:
            cells.append(f"{stability[name]:.2f}" if name in stability else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([f"| score | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1), *lines])


def draw(results: dict[str, Any], file: Path) -> None:
    """Gain of each method over no weighting: a dot per seed, a line at the mean."""
    metric = _metrics(results)[0]
    names = [
        name
        for name in dict.fromkeys(run["method"] for run in results["runs"])
        if name != "before" and name != baseline_of(name) and len(gains(results, name, metric))
    ]
    names.sort(key=lambda name: gains(results, name, metric).mean())
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(names) + 1))
    for i, name in enumerate(names):
        gain = gains(results, name, metric)
        axes.plot(gain, [i] * len(gain), "o", color="tab:blue", alpha=0.6)
        axes.plot([gain.mean()] * 2, [i - 0.3, i + 0.3], color="black")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(f"{'lower' if METRICS[metric] else 'higher'} {metric} on the test rows than without weights")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
