"""`ica-plugin audit`: what the scorers say of given data and a given model, before anyone spends a training run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr

from ..data.holdout import Holdout
from ..data.store import Example
from ..errors import ICAError
from ..expression import parse_score, parts_of
from ..log import get_logger
from ..run.callback import ICACallback
from ..scorers import balanced_score, scores_for_sets
from ..scorers.context import ScoringContext
from .noise import corrupted
from .page import Section, picture, write_page

ALWAYS = ("ica", "likelihood", "ica + likelihood", "one_shot", "rds", "random")


WITH_ADAPTER = ("influence",)


# Scores between these two quantiles differ little, so agreement is read at the ends, which weights and filters act on.
DECILE = 0.1


SHOWN_ROWS = 5


FEWEST_PLANTED = 5


def write_audit(host: ModuleType, config: Path, out: Path, *, rows: int, planted: int, scorers: list[str] | None) -> Path:
    """Score a sample of the train rows in every way, and write what it shows as one HTML file with JSON beside it.

    Args:
        host: the host's module, with `attached`.
        config: the host's config; nothing is trained, except by `rho` and `lossdiff` if asked for.
        out: the HTML file.
        rows: train rows in the sample, drawn by the block's seed.
        planted: rows of the sample that are also scored corrupted.
        scorers: what stands under `score:`, each one; default: all that the run's rows and model allow without training.

    Returns:
        the HTML file.

    Raises:
        ICAError: what is wrong with the config, or a scorer that is not defined for it.
    """
    callback, _ = host.attached(config, {})
    if callback.trainer.accelerator.num_processes > 1:
        raise ICAError("the audit runs in one process; start it without a launcher.")
    numbers = audit_numbers(callback, rows=rows, planted=planted, scorers=scorers)
    write_page(out, f"ICA audit: {config.name}", _sections(numbers), numbers)
    return out


def audit_numbers(callback: ICACallback, *, rows: int, planted: int, scorers: list[str] | None = None) -> dict[str, Any]:
    """The numbers of the page; see `write_audit`.

    Returns:
        `data` (counts), `scores` (one dict per scorer: mean, std, quantiles, seconds), `agreement` (one dict per pair of
        scorers: rank correlation, overlap of the best and of the worst tenth, chance is 0.1), `influence` (the same of each
        scorer with exact influence; empty for a full finetune), `sensitivity` (of ICA), `noise` (AUROC by kind of
        corruption and scorer: 1 ranks every clean row above its corrupted copies, 0.5 is chance; `noise left out` has the kinds
        that fewer than 5 of the planted rows allow), `best` and `worst` rows
        by the block's own score, with their text, and `values` (the sample's scores by scorer).
    """
    seed = callback.config.seed
    rng = np.random.default_rng(seed)
    scorable = [i for i, row in enumerate(callback.train) if row.can_be_scored]
    if len(scorable) < 20:
        raise ICAError(f"an audit needs at least 20 train rows with supervised tokens, and there are {len(scorable)}.")
    sample = sorted(rng.choice(scorable, min(rows, len(scorable)), replace=False).tolist())
    audit = _Audit(callback, sample)
    names = list(dict.fromkeys([*(scorers or _defined(callback)), callback.config.score]))
    columns: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    for part in _parts(names):  # each by itself, to tell what it costs
        get_logger().info("audit: %d rows by %s.", len(sample), part)
        begin = time.monotonic()
        columns |= audit.columns([part])
        seconds[part] = time.monotonic() - begin
    values, described = {}, []
    for name in names:
        values[name] = audit.total(name, columns)
        finite = values[name][np.isfinite(values[name])]
        described.append(
            {
                "scorer": name,
                "mean": float(finite.mean()),
                "std": float(finite.std()),
                **{f"q{int(100 * q)}": float(np.quantile(finite, q)) for q in (0.01, 0.25, 0.5, 0.75, 0.99)},
                "without a score": int(len(sample) - len(finite)),
                "seconds, alone": sum(seconds[part] for part in _parts([name])),
            }
        )
    agreement = [
        {"scorer": a, "with": b, **_agreement(values[a], values[b])} for i, a in enumerate(names) for b in names[i + 1 :]
    ]
    tokenizer = callback.trainer.processing_class
    ranked = np.argsort(-values[callback.config.score], kind="stable")
    ranked = ranked[np.isfinite(values[callback.config.score][ranked])]

    def texts(index: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "row": sample[i],
                "score": float(values[callback.config.score][i]),
                **{
                    side: tokenizer.decode(sequence.tokens)[:1500]
                    for side, sequence in zip(("text", "rejected"), callback.train[sample[i]].sequences, strict=False)
                },
            }
            for i in index
        ]

    noise, left_out = audit.noise(names, planted, rng)
    return {
        "data": {
            "train rows": len(callback.train),
            "rows in the sample": len(sample),
            "kind": callback.train[0].kind,
            "without supervised tokens": len(callback.train) - len(scorable),
            "holdout rows": len(callback.holdout.examples),
            "shown as demonstrations": len(callback.holdout.shown),
            "train rows that are also in the holdout": callback.holdout.rows_in_train,
            "median supervised tokens": float(np.median([callback.train[i].supervised_tokens for i in scorable])),
            "score of the config": callback.config.score,
        },
        "scores": described,
        "agreement": agreement,
        "influence": [{"scorer": n, **_agreement(values[n], values["influence"])} for n in names if n != "influence"]
        if "influence" in names
        else [],
        "sensitivity": audit.sensitivity(audit.total("ica", columns) if "ica" in seconds else None),
        "noise": noise,
        "noise left out": left_out,
        "best": texts(ranked[:SHOWN_ROWS]),
        "worst": texts(ranked[::-1][:SHOWN_ROWS]),
        "values": {name: column.tolist() for name, column in values.items()},
    }


class _Audit:
    """One policy, one sample of rows, scored in several ways."""

    def __init__(self, callback: ICACallback, sample: list[int]):
        self.callback, self.sample = callback, sample
        self.demonstrations = self.demonstrations_with()

    def demonstrations_with(self, holdout: Holdout | None = None, **keys: Any) -> list[list[int]]:
        """The sample's demonstrations as a run would find them, whatever its score, or with other keys or holdout rows."""
        config = self.callback.config.model_copy(update={"score": "ica", **keys})
        return self.callback.scoring.find_demonstrations(self.sample, config, holdout)

    def columns(self, parts: list[str], context: ScoringContext | None = None) -> dict[str, np.ndarray]:
        """Scores by scorer and holdout set, of the sample or of a context's rows, computed together."""
        context = context or self.callback.scoring.context(self.sample, self.demonstrations)
        return scores_for_sets(
            dataclasses.replace(context, config=self.callback.config.model_copy(update={"score": " + ".join(parts)}))
        )

    def total(self, score: str, columns: dict[str, np.ndarray]) -> np.ndarray:
        return balanced_score(self.callback.config.model_copy(update={"score": score}), columns)

    def ica(self, demonstrations: list[list[int]] | None = None, **of_context: Any) -> np.ndarray:
        """ICA of the sample with other demonstrations, or with other attributes of the scoring context."""
        context = self.callback.scoring.context(self.sample, self.demonstrations if demonstrations is None else demonstrations)
        return self.total("ica", self.columns(["ica"], dataclasses.replace(context, **of_context)))

    def sensitivity(self, own: np.ndarray | None) -> list[dict[str, Any]]:
        """ICA under other demonstrations, against ICA as the config has it (`own`, where it is known)."""
        get_logger().info("audit: ICA with other demonstrations.")
        config, holdout = self.callback.config, self.callback.holdout
        own = self.ica() if own is None else own
        rng = np.random.default_rng(config.seed)
        found = [
            {"ICA with": f"k = {k}", **_agreement(own, self.ica(self.demonstrations_with(k=k)))}
            for k in sorted({1, 3, 5} - {config.k})
            if k <= min(map(len, holdout.sets.values()))
        ]
        found.append({"ICA with": "the order turned round", **_agreement(own, self.ica([d[::-1] for d in self.demonstrations]))})
        if config.retrieval != "random":
            at_random = self.ica(self.demonstrations_with(retrieval="random"))
            found.append({"ICA with": "demonstrations at random", **_agreement(own, at_random)})
        bare = [
            dataclasses.replace(row, sequences=(_answer(row), *row.sequences[1:])) if row.can_be_scored else row
            for row in holdout.examples
        ]
        without_prompts = self.ica(holdout=dataclasses.replace(holdout, examples=bare))
        found.append({"ICA with": "another template: answers alone, without their prompts", **_agreement(own, without_prompts)})
        if all(len(shown) >= 4 for shown in holdout.sets.values()):
            mixed = [rng.permutation(shown).tolist() for shown in holdout.sets.values()]
            halves = [
                self.ica(self.demonstrations_with(holdout.part([row for shown in mixed for row in sorted(shown[half::2])])))
                for half in (0, 1)
            ]
            found.append({"ICA with": "one half of the holdout against the other", **_agreement(*halves)})
        return found

    def noise(self, names: list[str], planted: int, rng: np.random.Generator) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """AUROC of each scorer for clean rows against their corrupted copies, scored together; and the kinds of corruption
        that too few of the planted rows allow, with how many do."""
        callback = self.callback
        # A corrupted undesirable row is rightly the better one.
        good = [i for i, row in enumerate(self.sample) if callback.train[row].desirable]
        picked = sorted(rng.choice(good, min(planted, len(good)), replace=False).tolist())
        clean = [callback.train[self.sample[i]] for i in picked]
        shown = [self.demonstrations[i] for i in picked]
        hidden = [callback.holdout.hidden_from[self.sample[i]] for i in picked]
        copies = corrupted(clean, callback.trainer.processing_class, rng)
        places = {kind: [i for i, row in enumerate(bad) if row is not None] for kind, bad in copies.items()}
        left_out = {kind: len(here) for kind, here in places.items() if len(here) < FEWEST_PLANTED}
        places = {kind: here for kind, here in places.items() if kind not in left_out}
        if not places:
            return [], left_out
        # The clean rows and all their copies at once: the clean ones are scored but once.
        origin = [*range(len(clean)), *(i for here in places.values() for i in here)]
        train: list[Example] = [*clean, *(copies[kind][i] for kind, here in places.items() for i in here)]
        context = dataclasses.replace(
            callback.scoring.context([], []),
            train=train,
            rows=list(range(len(train))),
            demonstrations=[shown[i] for i in origin],
            holdout=dataclasses.replace(callback.holdout, hidden_from=[hidden[i] for i in origin]),
        )
        kept = context.kept  # holdout adapters may stay; what was kept by row is of other rows
        context.kept = _adapter(kept) | {name: _adapter(kept[name]) for name in callback.config.sets if name in kept}
        get_logger().info("audit: planted noise, %d rows.", len(train))
        columns = self.columns(_parts(names), context)
        result, start = [], len(clean)
        for kind, here in places.items():
            rows = [*here, *range(start, start + len(here))]
            part = {name: column[rows] for name, column in columns.items()}
            chance = 2 * np.sqrt((2 * len(here) + 1) / 12) / len(here)
            result.append(
                {"corruption": kind, "rows": len(here), "chance": f"0.5 ± {chance:.2f}"}
                | {name: auroc(self.total(name, part), len(here)) for name in names}
            )
            start += len(here)
        return result, left_out


def _parts(names: list[str]) -> list[str]:
    """The scorers of all sums, each once."""
    return list(dict.fromkeys(part for name in names for part in parts_of(parse_score(name))))


def _adapter(kept: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kept.items() if key == "adapter"}


def _defined(callback: ICACallback) -> list[str]:
    """Scorers that this run allows and that train nothing."""
    adapter = hasattr(callback.trainer.model, "peft_config")
    pairs = callback.train[0].kind == "pair"
    return [*ALWAYS, *(WITH_ADAPTER if adapter else ()), *(("irm", "ica-irm") if adapter and pairs else ())]


def _answer(row: Example) -> Any:
    """The (chosen) sequence from its first supervised token on."""
    sequence = row.sequences[0]
    first = int(np.argmax(sequence.scored))
    return dataclasses.replace(sequence, tokens=sequence.tokens[first:], scored=sequence.scored[first:])


def _agreement(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    """Rank correlation, and the share that the best tenths and the worst tenths have in common, over rows that both score."""
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"rank correlation": None, "best tenth shared": None, "worst tenth shared": None}
    size = max(1, round(DECILE * len(a)))
    first, second = np.argsort(-a, kind="stable"), np.argsort(-b, kind="stable")
    return {
        "rank correlation": float(spearmanr(a, b).statistic),
        "best tenth shared": len(set(first[:size]) & set(second[:size])) / size,
        "worst tenth shared": len(set(first[-size:]) & set(second[-size:])) / size,
    }


def auroc(scores: np.ndarray, clean: int) -> float | None:
    """Chance that one of the first `clean` rows scores above one of the others; ties count half."""
    good, bad = (part[np.isfinite(part)] for part in (scores[:clean], scores[clean:]))
    if not len(good) or not len(bad):
        return None
    ranks = rankdata(np.concatenate([good, bad]))[: len(good)]
    return float((ranks.sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad)))


def _sections(numbers: dict[str, Any]) -> list[Section]:
    values = numbers["values"]

    def distributions(axes: Any) -> None:
        ranked = {name: np.array(column)[np.isfinite(column)] for name, column in values.items()}
        scaled = [(column - column.mean()) / (column.std() or 1) for column in ranked.values()]
        axes.violinplot(scaled, showmedians=True, widths=0.8)
        axes.set_xticks(range(1, len(ranked) + 1), list(ranked), rotation=20, fontsize=8)
        axes.set_ylabel("score, standard deviations")

    def matrix(axes: Any) -> None:
        names = list(values)
        grid = np.eye(len(names))
        for line in numbers["agreement"]:
            i, j = names.index(line["scorer"]), names.index(line["with"])
            grid[i, j] = grid[j, i] = np.nan if line["rank correlation"] is None else line["rank correlation"]
        axes.imshow(grid, vmin=-1, vmax=1, cmap="RdBu")
        axes.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        for i in range(len(names)):
            for j in range(len(names)):
                axes.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=7)

    def noise(axes: Any) -> None:
        for name in values:
            axes.plot(
                [line["corruption"] for line in numbers["noise"]], [line[name] for line in numbers["noise"]], "o", label=name
            )
        axes.axhline(0.5, color="grey", linewidth=0.8)
        axes.set(ylabel="AUROC", ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=8, ncols=4)

    count = numbers["data"]["rows in the sample"]
    shared = (
        f"Chance is 0 ± {2 / np.sqrt(count - 1):.2f} (two standard deviations) for the rank correlation of {count} rows, and 0.1 for "
        f"the shared tenths, which are {max(1, round(DECILE * count))} rows each."
    )
    sections = [
        Section("The data", rows=[{"": name, "value": value} for name, value in numbers["data"].items()]),
        Section(
            "Score distributions",
            "Seconds are of one scorer alone; together they share forwards.",
            picture(distributions),
            numbers["scores"],
        ),
        Section(
            "Agreement of the scorers",
            f"Rank correlation over the sample. {shared}",
            picture(matrix, (6.5, 5.5)),
            numbers["agreement"],
        ),
        Section(
            "Agreement with exact influence",
            f"Row gradient · holdout gradient over the adapter. {shared}"
            if numbers["influence"]
            else "Not computed: influence takes gradients over an adapter's parameters, and it is not among the scorers, or the run trains the whole model.",
            rows=numbers["influence"],
        ),
        Section(
            "Sensitivity of ICA",
            f"ICA as the config has it against ICA with another choice. {shared}",
            rows=numbers["sensitivity"],
        ),
    ]
    if numbers["noise"] or numbers["noise left out"]:
        text = "AUROC for a clean row against corrupted copies: 1 ranks every clean row above, below chance it prefers the corrupted."
        text += " Chance is given with two standard deviations."
        for kind, found in numbers["noise left out"].items():
            text += f" Left out: {kind}, which only {found} of the planted rows allow; plant more."
        sections.append(Section("Planted noise", text, picture(noise) if numbers["noise"] else "", numbers["noise"]))
    return [
        *sections,
        Section("Best rows", f"By the config's own score, `{numbers['data']['score of the config']}`.", rows=numbers["best"]),
        Section("Worst rows", rows=numbers["worst"]),
    ]
