"""What helps: the same training with and without weights, on data of which part is bad, by every scorer.

    python benchmarks/evidence.py noise --model SmolLM2-135M-Instruct --data <folder of the data files>
    python benchmarks/evidence.py off-target ...
    python benchmarks/evidence.py preferences ...
    python benchmarks/evidence.py simpo ...

For each seed, rows are taken, scored with the policy as it is before the first step, and a LoRA is trained once per method by
TRL's own trainers. Results are kept after every run in docs/evidence/<experiment>.json, so a stopped command goes on where it
was; docs/evidence.md gets the tables and pictures of all experiments that are there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from scipy.stats import spearmanr
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from evidence_methods import (
    BARE,
    CLEAN,
    FEWER_SEEDS,
    PAIR_METHODS,
    PER_TOKEN,
    SFT_METHODS,
    SUM,
    Cut,
    compared,
    controls,
    cuts,
    manner_of,
    more_cuts,
)
from evidence_page import FOLDER, UNSCALED, write_page
from evidence_rows import Row, Rows, draw
from evidence_tokens import TokenLogprobs, kept_tokens, token_logprobs, train_weighted_tokens
from ica_plugin import attach
from ica_plugin.config import parse_config
from ica_plugin.expression import parse_score, parts_of
from ica_plugin.scorers import scores_for, total_score
from ica_plugin.tools.measures import auroc
from ica_plugin.weighting.draws import draw as draw_rows
from ica_plugin.weighting.draws import fill
from ica_plugin.weighting.weights import Weights, weights_from_scores
from scoring import machine_name

# Sizes and learning rates were chosen so that the oracle is ahead of no weighting, before any other method was run.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "noise": {
        "rows": {
            "clean": 32,
            "altered numbers": 24,
            "another row's answer": 24,
            "steps dropped": 8,
            "steps shuffled": 8,
            "holdout": 200,
            "test": 48,
        },
        "longest": 110,
        "learning_rate": 2e-3,
        "scorers": ["ica", "likelihood", "one_shot", "rho", "rds", "influence", "random"],
    },
    "off-target": {
        "rows": {"gsm8k": 32, "alpaca": 32, "code": 32, "holdout": 200, "test": 48},
        "longest": 110,
        "learning_rate": 3e-4,
        "scorers": ["ica", "likelihood", "one_shot", "rho", "rds", "influence", "random"],
    },
    "preferences": {
        "rows": {"right way round": 34, "flipped": 14, "holdout": 40, "test": 60},
        "longest": 160,
        "learning_rate": 1e-3,
        "scorers": ["ica", "likelihood", "one_shot", "lossdiff", "rds", "influence", "random"],
    },
}
# Nothing is spoilt here: what a method must not lose.
EXPERIMENTS["gsm8k"] = EXPERIMENTS["noise"] | {
    "rows": {"clean": 96, "holdout": 200, "test": 48},
    "scorers": ["ica", "likelihood"],
}
EXPERIMENTS["alpaca"] = EXPERIMENTS["gsm8k"] | {"learning_rate": 1e-3}
# SimPO needs larger steps to move. Its rows are those of DPO, so the costly scorers are not tried again.
EXPERIMENTS["simpo"] = EXPERIMENTS["preferences"] | {"learning_rate": 3e-3, "scorers": ["ica", "likelihood", "rds", "random"]}

# Other ways to ICA. How demonstrations are found: scores of the first seed's rows, no training. SimPO's is per token by itself.
RETRIEVALS = {f"ica, retrieval {name}": {"score": "ica", "retrieval": name} for name in ("bm25", "random")}
# Of one thread: what else the machine does is not counted.
clock = time.monotonic if torch.cuda.is_available() else time.process_time
LORA = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
HOLDOUT_ADAPTER = {"steps": 25, "learning_rate": 1e-3}
HOLDOUT_ADAPTER_OF_PAIRS = HOLDOUT_ADAPTER | {"steps": 10}


class DrawnOrder(Sampler[int]):
    """The host's order of an epoch with rows in it as often as they were drawn.

    Args:
        host: its sampler.
        draws: int [rows], how often each is trained.
    """

    def __init__(self, host: Any, draws: np.ndarray):
        self.host, self.draws = host, draws

    def __iter__(self):
        return iter(fill(np.array(list(self.host)), self.draws).tolist())

    def __len__(self) -> int:
        return int(self.draws.sum())

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.host, "set_epoch"):
            self.host.set_epoch(epoch)


def train_drawn(trainer: Any, draws: np.ndarray) -> None:
    """Make a trainer train each row as often as it was drawn, in its own order otherwise: `apply: sample` without the plugin, which
    has no token weights yet."""
    host_loader = trainer.get_train_dataloader

    def drawn_loader() -> Any:
        loader = host_loader()
        loader.batch_sampler.sampler = DrawnOrder(loader.batch_sampler.sampler, draws)
        return loader

    trainer.get_train_dataloader = drawn_loader


class Experiment:
    """One experiment on one seed's rows.

    Args:
        name: of the experiment.
        args: of the command line.
        seed: of the draw, the LoRA's start and the order of the rows.
    """

    def __init__(self, name: str, args: argparse.Namespace, seed: int):
        self.name, self.args, self.seed, self.settings = name, args, seed, EXPERIMENTS[name]
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        # CPOTrainer sets it too, but after it made its collator.
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        drawn = "preferences" if name == "simpo" else name
        sizes = {kind: count * (1 if kind in UNSCALED else args.scale) for kind, count in self.settings["rows"].items()}
        self.rows: Rows = draw(drawn, Path(args.data), self._fits, seed, sizes)
        self.kinds = np.array([row["kind"] for row in self.rows.train])
        self.pairs = "chosen" in self.rows.train[0]
        self.scores: dict[str, np.ndarray] = {}
        self.tokens = np.array([self._answer_tokens(row) for row in self.rows.train])
        self._logprobs: TokenLogprobs | None = None

    def _fits(self, row: Row) -> bool:
        return all(
            len(self._tokens(row, side)[0]) <= self.settings["longest"]
            for side in ("completion", "chosen", "rejected")
            if side in row
        )

    def _tokens(self, row: Row, side: str) -> tuple[list[int], int]:
        text = self.tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        prompt = self.tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text).input_ids, len(self.tokenizer(prompt).input_ids)

    def _answer_tokens(self, row: Row) -> int:
        tokens, prompt = self._tokens(row, "chosen" if self.pairs else "completion")
        return len(tokens) - prompt

    def trainer(self, rows: list[Row] | None = None, *, places: int | None = None, learning_rate: float | None = None) -> Any:
        """A fresh LoRA on the model, and TRL's trainer for it.

        Args:
            rows: to train on, instead of the train rows.
            places: rows trained; default: as many as there are train rows.
            learning_rate: default: the experiment's.
        """
        gpu = torch.cuda.is_available()
        torch.manual_seed(self.seed)
        model = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.bfloat16)
        steps = -(-(places or len(self.rows.train)) // self.args.batch)
        settings = {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": self.args.batch,
            "max_steps": steps,
            "learning_rate": learning_rate or self.settings["learning_rate"],
            "seed": self.seed,
            "use_cpu": not gpu,
            "bf16": gpu,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        make, config = {
            "preferences": (DPOTrainer, DPOConfig),
            "simpo": (CPOTrainer, CPOConfig),
        }.get(self.name, (SFTTrainer, SFTConfig))
        if self.name == "simpo":
            settings |= {"loss_type": "simpo", "cpo_alpha": 0.0, "max_length": 512}
        return make(
            model,
            args=config(**settings),
            train_dataset=_dataset(rows or self.rows.train),
            processing_class=self.tokenizer,
            peft_config=LoraConfig(**LORA),
        )

    def block(self, keys: dict[str, Any]) -> dict[str, Any]:
        """The block of a method, which names what the block's defaults would follow the run in."""
        adapter = HOLDOUT_ADAPTER_OF_PAIRS if self.pairs else HOLDOUT_ADAPTER
        named = {
            "score": "ica",
            "weighting": "softmax",
            "apply": "gradient",
            "length_normalize": self.name == "simpo",
            "drop_tokens": None,
        }
        return {"holdout_adapter": adapter, "seed": self.seed, **named, **keys}

    def score(self, holdout: list[Row], scorers: set[str], variants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Score the train rows before the first step by each of the scorers that `scores` lacks; ICA also by `variants`."""
        lines = []
        plans = {name: {"score": name} for name in self.settings["scorers"] if name in scorers} | variants
        missing = [label for label in plans if label not in self.scores]
        if missing:
            callback = attach(self.trainer(), self.block({}), holdout=_dataset(holdout))
            assert self.pairs or np.array_equal(self.tokens, callback.refresh.tokens)
            rows, scoring = list(range(len(callback.train))), callback.scoring
        retrieved: dict[tuple[Any, ...], list[list[int]]] = {}
        for label in missing:
            begin = clock()
            config = scoring.config = parse_config(self.block({"holdout": "rows", **plans[label]}))
            scoring.length_normalize = bool(config.length_normalize)
            choice = (config.retrieval, config.retrieval_groups, config.k)
            if config.shows_demonstrations and choice not in retrieved:
                retrieved[choice] = scoring.find_demonstrations(rows)
            context = scoring.context(rows, retrieved.get(choice, [[] for _ in rows]))
            self.scores[label] = total_score(config, scores_for(context))
            lines.append(self._described(label, self.scores[label], clock() - begin))
        for label in ("ica", *variants):
            columns = {"ica": self.scores[label], "likelihood": self.scores["likelihood"]}
            both = label.replace("ica", SUM)
            if both not in self.scores:
                self.scores[both] = total_score(parse_config({"holdout": "rows", "score": SUM}), columns)
                lines.append(self._described(both, self.scores[both], None))
        return lines

    def _described(self, label: str, scores: np.ndarray, seconds: float | None) -> dict[str, Any]:
        good = self.kinds == self.rows.good
        kinds = [kind for kind in dict.fromkeys(self.kinds.tolist()) if kind != self.rows.good]
        return {
            "seed": self.seed,
            "scorer": label,
            "seconds": seconds,
            "values": scores.tolist(),
            "kinds": self.kinds.tolist(),
            "auroc": {kind: auroc(np.concatenate([scores[good], scores[self.kinds == kind]]), int(good.sum())) for kind in kinds},
        }

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """Those that refresh, or whose scorers are the experiment's."""
        known, scorers = PAIR_METHODS if self.pairs else SFT_METHODS, set(self.settings["scorers"])
        return {
            method: keys
            for method, keys in known.items()
            if ("refresh_interval" in keys or scorers.issuperset(parts_of(parse_score(keys["score"]))))
            and ("length_normalize" not in keys or self.name == "preferences")
        }

    def weights(self, method: str, *, by_token: bool) -> Weights | None:
        """Weights of the train rows before the first step; None where the method has none or finds them in the run.

        Args:
            method: a weighting, without how it trains.
            by_token: mean 1 over supervised tokens, as for scaled gradients of SFT, instead of over rows.
        """
        keys = self.methods.get(method)
        if method == "oracle":
            good = self.kinds == self.rows.good
            no = np.zeros(len(good), bool)
            return Weights(good / np.average(good, weights=self.tokens if by_token else None), no, no)
        if keys is None or "refresh_interval" in keys:
            return None
        config = parse_config(self.block({"holdout": "rows", **keys}))
        columns = self.scores | (
            {"ica": self.scores[PER_TOKEN]} if config.length_normalize and self.name == "preferences" else {}
        )
        return weights_from_scores(total_score(config, columns), config, tokens=self.tokens, by_token=by_token)

    def run(self, method: str) -> dict[str, Any]:
        """Train by a method, and measure on the test rows."""
        manner = manner_of(method)
        keys = self.methods.get(manner.weighting)
        if keys is None and manner.weighting not in BARE:
            raise SystemExit(f"{self.name} has no method `{method}`.")
        weights = self.weights(manner.weighting, by_token=not self.pairs and not manner.drawn)
        alone = {"holdout alone": self.rows.holdout}.get(manner.weighting)
        if manner.weighting.endswith("alone") and alone is None:
            kept = self.kinds == self.rows.good if weights is None else weights.values > 0
            alone, weights = [row for row, keep in zip(self.rows.train, kept, strict=True) if keep], None
        divisor = manner.divisor or weights.effective_sample_size**0.5
        places = round(manner.share * len(self.rows.train))
        trainer = self.trainer(alone, places=places, learning_rate=self.settings["learning_rate"] / divisor)
        callback, trained = None, {}
        draws = np.ones(len(self.rows.train), int)
        if manner.drawn:
            draws = draw_rows(weights.values, places, seed=self.seed, epoch=0)
            if manner.cut is None:
                block = {"apply": "sample", "epoch_share": manner.share, "seed": self.seed}
                callback = attach(trainer, block, weights=weights.values)
            else:
                train_drawn(trainer, draws)
            kinds = dict.fromkeys(self.kinds.tolist())
            trained = {
                "distinct": int((draws > 0).sum()),
                "places": {kind: int(draws[self.kinds == kind].sum()) for kind in kinds},
            }
        elif weights is not None:
            callback = attach(trainer, {"apply": "gradient"}, weights=weights.values)
        elif keys is not None and alone is None:
            callback = attach(trainer, self.block(keys), holdout=_dataset(self.rows.holdout))
        if weights is not None:
            trained["effective sample size"] = weights.effective_sample_size
        if manner.cut is not None:
            trained |= self._leave_tokens_out(trainer, manner.cut, draws)
        begin = clock()
        trainer.train()
        seconds = clock() - begin
        return {
            "seed": self.seed,
            "method": method,
            "seconds": seconds,
            "scoring seconds": callback.clock.scoring_seconds if callback else 0.0,
            "steps": trainer.state.global_step,
            **trained,
            **self.measure(trainer.model),
        }

    def _leave_tokens_out(self, trainer: Any, cut: Cut, draws: np.ndarray) -> dict[str, Any]:
        """Give the tokens below the threshold weight 0 and the others mean 1 over all tokens trained; shares left out."""
        if self._logprobs is None:
            self._logprobs = token_logprobs(attach(self.trainer(), self.block({}), holdout=_dataset(self.rows.holdout)))
            assert [len(values) for values in self._logprobs.train[True]] == self.tokens.tolist()
        kept = kept_tokens(self._logprobs, cut, always=self.tokenizer.eos_token_id)
        left = np.array([values.sum() for values in kept])
        scale = (draws * self.tokens).sum() / (draws * left).sum()
        train_weighted_tokens(trainer, self._logprobs.sequences, [scale * values for values in kept])
        shares = {kind: 1 - left[self.kinds == kind].sum() / count for kind, count in self._by_kind(self.tokens).items()}
        return {"tokens left out": 1 - 1 / scale, "of each kind": shares}

    def _by_kind(self, counts: np.ndarray) -> dict[str, int]:
        return {kind: int(counts[self.kinds == kind].sum()) for kind in dict.fromkeys(self.kinds.tolist())}

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Loss per token of the test answers; for pairs, accuracy and margin (DPO: of the implicit reward, SimPO: of the mean
        log-prob per token)."""
        model.eval()
        if not self.pairs:
            sums, counts = _logprobs(model, [self._tokens(row, "completion") for row in self.rows.test])
            return {"loss": float(-sums.sum() / counts.sum())}
        margins = self._margins(model)
        if self.name == "preferences":
            with model.disable_adapter():
                margins = 0.1 * (margins - self._margins(model))
        return {"accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}

    def _margins(self, model: Any) -> np.ndarray:
        sides = []
        for side in ("chosen", "rejected"):
            sums, counts = _logprobs(model, [self._tokens(row, side) for row in self.rows.test])
            sides.append(sums / (counts if self.name == "simpo" else 1))
        return sides[0] - sides[1]


def stability(one: Experiment, other: Experiment, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rank correlation of the first seed's scores with those of the same rows against the other seed's holdout."""
    before = {line["scorer"]: line["values"] for line in results["scores"] if line["seed"] == one.seed}
    trained = {json.dumps(row["prompt"]) for row in one.rows.train}
    again = one.score([row for row in other.rows.holdout if json.dumps(row["prompt"]) not in trained], set(before), {})
    return [
        {"scorer": line["scorer"], "stability": float(spearmanr(before[line["scorer"]], line["values"]).statistic)}
        for line in again
    ]


def _logprobs(model: Any, rows: list[tuple[list[int], int]], batch: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-prob and number of the tokens after the prompt: a plain padded loop, none of the plugin's code."""
    sums, counts = [], []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        longest = max(len(tokens) for tokens, _ in part)
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in part], device=model.device)
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in part], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        values = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        position = torch.arange(1, longest, device=model.device)
        answer = torch.stack([(position >= prompt) & (position < len(tokens)) for tokens, prompt in part])
        sums += (values * answer).sum(1).tolist()
        counts += answer.sum(1).tolist()
    return np.array(sums), np.array(counts)


def _dataset(rows: list[Row]) -> Dataset:
    return Dataset.from_list([{key: value for key, value in row.items() if key != "kind"} for row in rows])


def _save(file: Path, results: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".partial")
    whole.write_text(json.dumps(results, indent=1))
    whole.replace(file)


def wanted_methods(experiment: Experiment) -> list[str]:
    """Those that the command line names, or all that are to be run with the experiment's seed."""
    name, args = experiment.name, experiment.args
    sets = {"compared": compared(name), "controls": controls(name), "cuts": cuts(name), "more-cuts": more_cuts(name)}
    if args.methods:
        wanted = [method for given in args.methods for method in sets.get(given, [given])]
    elif name in CLEAN:
        wanted = ["no weighting", f"{SUM}, top, drawn", *sets["cuts"], *sets["more-cuts"]]
    elif experiment.seed >= FEWER_SEEDS:
        wanted = sets["compared"]
    else:
        of_tokens = [] if experiment.pairs else [*sets["cuts"], *sets["more-cuts"]]
        wanted = [*sets["compared"], *sets["controls"], *of_tokens, *experiment.methods, "holdout alone"]
    return list(dict.fromkeys(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--model", required=True), parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", help="only these, or sets: compared, controls, cuts, more-cuts; default: all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--scale", type=int, default=1, help="times as many train rows")
    parser.add_argument("--out", type=Path, help="another file for the results; the page is then left alone")
    args = parser.parse_args()

    file = args.out or FOLDER / f"{args.experiment}{f'-{args.scale}x' if args.scale > 1 else ''}.json"
    results = json.loads(file.read_text()) if file.exists() else {"scores": [], "runs": []}
    setup = {"model": Path(args.model).name, "batch": args.batch, "scale": args.scale, "settings": EXPERIMENTS[args.experiment]}
    other = [key for key, value in setup.items() if results.get(key, value) != value]
    if other:
        raise SystemExit(f"{file} has results of another {', '.join(other)}; move it away to start anew.")
    results |= {"machine": machine_name(), "threads": torch.get_num_threads(), **setup}
    for seed in args.seeds:
        experiment = Experiment(args.experiment, args, seed)
        wanted = wanted_methods(experiment)
        done = {run["method"] for run in results["runs"] if run["seed"] == seed}
        if not [method for method in wanted if method not in done]:
            continue
        if not any(run["seed"] == seed and run["method"] == "before" for run in results["runs"]):
            results["runs"].append({"seed": seed, "method": "before", **experiment.measure(experiment.trainer().model)})
        known = {line["scorer"]: line for line in results["scores"] if line["seed"] == seed}
        if not {manner_of(method).weighting for method in wanted} <= set(BARE):
            experiment.scores = {name: np.array(line["values"]) for name, line in known.items()}
            variants = {}
            if not experiment.pairs and seed == 0 and args.methods is None:
                variants = RETRIEVALS
            elif args.experiment == "preferences":
                variants = {PER_TOKEN: PAIR_METHODS[PER_TOKEN]}
            scorers = {"ica", "likelihood"}
            for method in {manner_of(method).weighting for method in wanted} & set(experiment.methods):
                scorers |= set(parts_of(parse_score(experiment.methods[method]["score"])))
            results["scores"] += experiment.score(experiment.rows.holdout, scorers, variants)
            _save(file, results)
        for method in wanted:
            if method not in done:
                results["runs"].append(experiment.run(method))
                _save(file, results)
                print(results["runs"][-1], flush=True)
    if args.methods is None and len(args.seeds) > 1 and "stability" not in results:
        results["stability"] = stability(*(Experiment(args.experiment, args, seed) for seed in args.seeds[:2]), results)
        _save(file, results)
    if args.out is None:
        write_page()


if __name__ == "__main__":
    main()
