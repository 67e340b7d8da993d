"""The scoring engine against the plain loop it replaces, side by side in one process.

    python benchmarks/scoring.py --model SmolLM2-135M-Instruct --gsm8k gsm8k_train.jsonl --alpaca alpaca_en_demo.json \
        --pairs dpo_en_demo.json

Engine forwards, reference batches and LoRA training steps take turns, so what else the machine does hits all alike. With
`--share` below 1 only that share of each is run, evenly spread over its batches by size, and its seconds per token times
all of its tokens is the whole; the rows of the reference batches that were run are scored by the engine too, to compare
the scores. On a GPU, `--random 8b` takes a randomly initialised model of an 8B's shape in 4-bit instead (speed and memory
do not depend on trained weights). Writes docs/benchmarks/<machine>.md, .png and .json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ica_plugin.config import ICAConfig
from ica_plugin.data.holdout import check_holdout
from ica_plugin.data.store import Example, Sequence
from ica_plugin.policy.engine import Engine
from ica_plugin.policy.memory import Budget, budget_for
from ica_plugin.policy.trees import grow
from ica_plugin.scorers.in_context import in_context
from ica_plugin.weighting.retrieval import retrieve

K = 3
BATCH = 16
GROUPS = 8
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"


# Data: prompt and response through the tokenizer's chat template.


def gsm8k(path: str) -> list[tuple[str, tuple[str, ...]]]:
    rows = map(json.loads, Path(path).read_text().splitlines())
    return [(row["question"], (re.sub(r"<<.*?>>", "", row["answer"]),)) for row in rows]


def alpaca(path: str) -> list[tuple[str, tuple[str, ...]]]:
    rows = json.loads(Path(path).read_text())
    return [(f"{row['instruction']}\n{row['input']}".strip(), (row["output"],)) for row in rows]


def pairs(path: str) -> list[tuple[str, tuple[str, ...]]]:
    rows = json.loads(Path(path).read_text())
    return [
        ("\n".join(turn["value"] for turn in row["conversations"]), (row["chosen"]["value"], row["rejected"]["value"]))
        for row in rows
    ]


def tokenise(tokenizer, rows: list[tuple[str, tuple[str, ...]]], longest: int) -> list[Example]:
    examples = []
    for prompt, responses in rows:
        question = [{"role": "user", "content": prompt}]
        start = tokenizer(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)).input_ids
        cut = max(0, len(start) - longest // 2)  # a long prompt loses its beginning, so that every row keeps a response
        sequences = []
        for response in responses:
            text = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": response}], tokenize=False)
            tokens = np.array(tokenizer(text).input_ids[cut : cut + longest], dtype=np.int64)
            sequences.append(Sequence(tokens, np.arange(len(tokens)) >= len(start) - cut))
        examples.append(Example(tuple(sequences), "sft" if len(sequences) == 1 else "pair"))
    return [example for example in examples if example.can_be_scored]


# The reference: two padded passes per row (four per pair), full logits, one batch size, rows as they come.


class Reference:
    def __init__(self, model, examples, demonstrations, holdout, batch: int):
        self.model, self.device = model, model.device
        variants = len(examples[0].sequences)
        self.batches: list[list[tuple[int, Sequence]]] = []
        self.sequences = flatten(examples, demonstrations, holdout)
        for start in range(0, len(examples), batch):
            rows = range(start, min(start + batch, len(examples)))
            for offset in range(2 * variants):
                index = [2 * variants * row + offset for row in rows]
                self.batches.append([(i, self.sequences[i]) for i in index])

    def tokens(self, batch) -> int:
        return len(batch) * max(len(s.tokens) for _, s in batch)

    @torch.no_grad()
    def run(self, batch) -> dict[int, float]:
        longest = max(len(s.tokens) for _, s in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
        attention, scored = torch.zeros_like(tokens), torch.zeros(len(batch), longest, dtype=torch.bool)
        for i, (_, sequence) in enumerate(batch):
            n = len(sequence.tokens)
            tokens[i, :n], attention[i, :n] = torch.from_numpy(sequence.tokens), 1
            scored[i, :n] = torch.from_numpy(sequence.scored)
        tokens, attention, scored = (x.to(self.device) for x in (tokens, attention, scored))
        logits = self.model(input_ids=tokens, attention_mask=attention, use_cache=False).logits
        result = {}
        for i, (index, _) in enumerate(batch):  # row by row, so that the float32 log-softmax of a pair batch fits
            values = torch.log_softmax(logits[i, :-1].float(), dim=-1).gather(1, tokens[i, 1:, None]).squeeze(1)
            result[index] = float((values.double() * scored[i, 1:]).sum())
        return result


def flatten(examples, demonstrations, holdout) -> list[Sequence]:
    """Base and context sequence of every response, row by row."""
    flat = []
    for example, shown in zip(examples, demonstrations, strict=True):
        context = [holdout[d].demonstration for d in shown]
        for sequence in example.sequences:
            flat += [sequence, in_context(sequence, context)]
    return flat


class Trees:
    """The engine's forwards, one by one, so that they can be timed in turns with the reference's."""

    def __init__(self, engine: Engine, sequences: list[Sequence]):
        self.engine, self.sequences = engine, sequences
        needed = np.array([int(s.scored.sum()) for s in sequences])
        self.batches = engine.path.split([s.tokens for s in sequences], needed, engine.budget)

    def tokens(self, batch: list[int]) -> int:
        return len(grow([self.sequences[i].tokens for i in batch]).tokens)

    def run(self, batch: list[int]) -> dict[int, float]:
        with self.engine.undisturbed():
            values = self.engine.path.token_logprobs([self.sequences[i] for i in batch])
        return {i: float(v.astype(np.float64).sum()) for i, v in zip(batch, values, strict=True)}


class Training:
    """LoRA steps over one epoch of the same rows (for pairs over both responses); the step size is 0, so that scores stay."""

    def __init__(self, model, examples: list[Example], micro_batch: int, seed: int = 0):
        self.model, self.rows = model, [sequence for row in examples for sequence in row.sequences]
        order = random.Random(seed).sample(range(len(self.rows)), len(self.rows))
        self.batches = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def tokens(self, batch: list[int]) -> int:
        return len(batch) * max(len(self.rows[i].tokens) for i in batch)

    def run(self, batch: list[int]) -> dict[int, float]:
        length = max(len(self.rows[i].tokens) for i in batch)
        ids, labels = torch.zeros(len(batch), length, dtype=torch.int64), torch.full((len(batch), length), -100)
        for line, i in enumerate(batch):
            row = self.rows[i]
            ids[line, : len(row.tokens)] = torch.from_numpy(row.tokens)
            labels[line, : len(row.tokens)] = torch.from_numpy(np.where(row.scored, row.tokens, -100))
        self.model.train()
        self.model(input_ids=ids.to(self.model.device), labels=labels.to(self.model.device), use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.eval()
        return {}


Side = Reference | Trees | Training


def timed(work: Callable, batch) -> tuple[float, float, dict[int, float]]:
    """Seconds by the clock and of this process's CPU time, which other processes do not lengthen."""
    synchronise()
    begin, cpu = time.perf_counter(), time.process_time()
    values = work(batch)
    synchronise()
    return time.perf_counter() - begin, time.process_time() - cpu, values


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(sides: dict[str, Side], share: float, group: dict[str, int], seed: int = 0) -> tuple[dict, dict]:
    """Run a share of the batches of every side in turns.

    Args:
        sides: what to run.
        share: of the tokens of each side.
        group: batches of a side that belong together (the passes over the same rows).

    Returns:
        per side {seconds, cpu_seconds, tokens, all_tokens, batches} and the whole's all_seconds, all_cpu_seconds, and per side the
        log-probs of the sequences that were run.
    """
    rng = random.Random(seed)
    todo, stats, values = [], {}, {}
    for name, side in sides.items():
        size = group.get(name, 1)
        groups = [side.batches[i : i + size] for i in range(0, len(side.batches), size)]
        groups.sort(key=lambda batches: sum(side.tokens(batch) for batch in batches))
        count = max(1, round(share * len(groups)))
        chosen = [groups[int((i + 0.5) / count * len(groups))] for i in range(count)]
        rng.shuffle(chosen)
        for i, batches in enumerate(chosen):
            todo.append(((i + rng.random()) / len(chosen), name, batches))
        total = sum(side.tokens(batch) for batch in side.batches)
        stats[name] = {"seconds": 0.0, "cpu_seconds": 0.0, "tokens": 0, "all_tokens": total, "batches": len(side.batches)}
        values[name] = {}
    for _, name, batches in sorted(todo, key=lambda item: item[0]):
        for batch in batches:
            seconds, cpu, found = timed(sides[name].run, batch)
            stats[name]["seconds"] += seconds
            stats[name]["cpu_seconds"] += cpu
            stats[name]["tokens"] += sides[name].tokens(batch)
            values[name].update(found)
            print(f"  {name}: {sides[name].tokens(batch)} tokens, {seconds:.1f} s", flush=True)
    for entry in stats.values():
        entry["all_seconds"] = entry["seconds"] / entry["tokens"] * entry["all_tokens"]
        entry["all_cpu_seconds"] = entry["cpu_seconds"] / entry["tokens"] * entry["all_tokens"]
    return stats, values


def scores_of(logprobs: dict[int, float], rows: list[int], variants: int) -> np.ndarray:
    width = 2 * variants
    values = np.array([[logprobs[width * row + i] for i in range(width)] for row in rows])
    gain = values[:, 1::2] - values[:, ::2]
    return gain[:, 0] - gain[:, 1] if variants == 2 else gain[:, 0]


def task(name: str, engine: Engine, tokenizer, examples: list[Example], n: int, args) -> list[dict]:
    """Measure one data set: exact demonstrations, and for `alpaca` with groups too."""
    train, held = examples[:n], examples[n:]
    holdout = check_holdout(name, held, train, None)
    variants = len(train[0].sequences)
    engine.budget = budget_of_run(engine, train, args)

    def demonstrations(**keys) -> list[list[int]]:
        config = ICAConfig(holdout="unused", k=K, retrieval=args.retrieval, **keys)
        return retrieve(
            train, holdout, config, rows=list(range(len(train))), context=None, embed=engine.embeddings, decode=tokenizer.decode
        )

    begin = time.perf_counter()
    exact = demonstrations()
    retrieval_seconds = time.perf_counter() - begin
    plain = Reference(engine.model, train, exact, held, args.pair_batch if variants == 2 else BATCH)
    sides: dict[str, Side] = {"reference": plain, "engine": Trees(engine, plain.sequences)}
    if name == "alpaca" and args.groups:
        grouped = flatten(train, demonstrations(retrieval_groups=GROUPS), held)
        sides["engine, groups"] = Trees(engine, grouped)
    sides["training"] = Training(engine.model, train, args.micro_batch, args.seed)
    print(name, flush=True)
    stats, values = compare(sides, args.share, {"reference": 2 * variants}, args.seed)
    rows = sorted({index // (2 * variants) for index in values["reference"]})
    wanted = {2 * variants * row + i for row in rows for i in range(2 * variants)}
    epoch = stats.pop("training")
    for side in stats:
        missing = sorted(wanted - values[side].keys())
        if missing:
            values[side].update(zip(missing, engine.logprobs([sides[side].sequences[i] for i in missing]), strict=True))
    expected = scores_of(values["reference"], rows, variants)
    results = []
    for side, entry in stats.items():
        found = scores_of(values[side], rows, variants)
        results.append(
            {
                "data": name,
                "side": side,
                "rows": len(train),
                "holdout": len(held),
                **entry,
                "rows_per_second": len(train) / entry["all_seconds"],
                "tokens_per_second": entry["tokens"] / entry["seconds"],
                "speedup": stats["reference"]["all_seconds"] / entry["all_seconds"],
                "cpu_speedup": stats["reference"]["all_cpu_seconds"] / max(entry["all_cpu_seconds"], 1e-9),
                "over_epoch": entry["all_seconds"] / epoch["all_seconds"],
                "epoch_seconds": epoch["all_seconds"],
                "retrieval_seconds": retrieval_seconds,
                "compared_rows": len(rows),
                "largest_difference": float(np.abs(found - expected).max()),
                "spearman": float(spearmanr(found, expected).statistic),
            }
        )
    return results


# Memory, and the cost of training.


class Peak:
    """Peak memory over a block, above what was held before: bytes of device memory, or resident memory on a CPU."""

    def __enter__(self) -> Peak:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
        self.bytes = peak - self._before


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def budget_of_run(engine: Engine, train: list[Example], args) -> Budget:
    """What the plugin allows scoring in a run with this micro-batch."""
    largest = max(sum(len(s.tokens) for s in row.sequences) for row in train)
    return budget_for(engine.model.config, engine.device, args.micro_batch * largest)


def peak_memory(engine: Engine, examples: list[Example], n: int, args) -> dict:
    """Peak memory of scoring a sample, the longest rows among it, against that of LoRA training steps on the longest rows."""
    train, held = examples[:n], examples[n:]
    longest = sorted(range(len(train)), key=lambda i: -train[i].longest)[: args.micro_batch]
    sample = longest + list(range(0, len(train), max(1, len(train) // 12)))
    shown = [[(7 * i + j) % len(held) for j in range(K)] for i in sample]
    sequences = flatten([train[i] for i in sample], shown, held)
    engine.budget = budget_of_run(engine, train, args)
    engine.logprobs(sequences[:2])
    with Peak() as scoring:
        engine.logprobs(sequences)
    step = Training(engine.model, [train[i] for i in longest], args.micro_batch * len(train[0].sequences))
    with Peak() as training:
        step.run(step.batches[0])
    return {"scoring_peak": scoring.bytes, "training_peak": training.bytes, "batch_tokens": engine.budget.tokens}


# The report.


def matmul_limit(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product in the model's precision."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronise()
        begin = time.perf_counter()
        a @ b
        synchronise()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def report(results: list[dict], memory: dict | None, machine: dict) -> str:
    per_token = 2 * machine["weights"]
    lines = [
        f"# Scoring on {machine['name']}",
        "",
        f"{machine['model']}, {machine['dtype']}, {machine['threads']} CPU thread(s), torch {torch.__version__}; demonstrations by "
        f"{machine['retrieval']}, k = {K}. {machine['share']:.0%} of the batches of each side were run, in turns; seconds are scaled to "
        f"all of them. The reference runs {BATCH} rows ({machine['pair_batch']} pairs) per batch. Retrieval is not in these times but below.",
        "",
        "| data | rows / holdout | | tokens | seconds | rows/s | tokens/s | share of matmul limit | speed-up | by CPU time | "
        "over a training epoch | largest difference, nats | Spearman | compared rows |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        share = r["tokens_per_second"] * per_token / machine["limit"]
        lines.append(
            f"| {r['data']} | {r['rows']:,} / {r['holdout']} | {r['side']} | {r['all_tokens']:,} | {r['all_seconds']:,.0f} | "
            f"{r['rows_per_second']:.2f} | {r['tokens_per_second']:,.0f} | {share:.0%} | {r['speedup']:.2f}× | "
            f"{r['cpu_speedup']:.2f}× | {r['over_epoch']:.2f} | {r['largest_difference']:.1e} | {r['spearman']:.4f} | {r['compared_rows']} |"
        )
    lines += [
        "",
        "The difference and rank correlation are to the reference's scores; with groups the demonstrations are others, so that the "
        "difference is not an error.",
        "",
    ]
    for r in results:
        if r["side"] == "engine":
            lines.append(
                f"- {r['data']}: retrieval {r['retrieval_seconds']:,.0f} s (not scaled), a LoRA training epoch {r['epoch_seconds']:,.0f} s."
            )
    if memory:
        lines += [
            "",
            f"Peak memory above the loaded model: scoring {memory['scoring_peak'] / 2**20:,.0f} MiB (at most "
            f"{memory['batch_tokens']:,} tokens per forward), LoRA training step {memory['training_peak'] / 2**20:,.0f} MiB.",
        ]
    return "\n".join(lines) + "\n"


def plot(results: list[dict], machine: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [r for r in results if r["side"] != "reference"]
    figure, axis = plt.subplots(figsize=(6, 0.6 * len(bars) + 1.2), layout="constrained")
    names = [r["data"] + (", groups" if "groups" in r["side"] else "") for r in bars]
    drawn = axis.barh(names, [r["speedup" if torch.cuda.is_available() else "cpu_speedup"] for r in bars], color="#3b6ea5")
    axis.bar_label(drawn, fmt="%.1f×", padding=3)
    axis.axvline(1, color="gray", linewidth=1)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel(
        f"times faster than the padded loop{'' if torch.cuda.is_available() else ', by CPU time'}\n{machine['model']} on {machine['name']}"
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def machine_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpu.read_text()) if cpu.exists() else None
    return found.group(1).strip() if found else platform.processor() or "CPU"


def page(title: str) -> Path:
    """Where a page of that title goes in docs/, without its suffix."""
    DOCS.mkdir(parents=True, exist_ok=True)
    return DOCS / re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def load(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.random == "8b":
        from transformers import BitsAndBytesConfig

        shape = LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=8192,
        )
        folder = Path(args.scratch) / "random-8b"
        if not folder.exists():
            torch.set_default_dtype(dtype)
            with device:
                AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
            torch.set_default_dtype(torch.float32)
            torch.cuda.empty_cache()
        quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, device_map={"": device})
        weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
        weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    return model, tokenizer, device, dtype, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model folder (with --random: for its tokenizer)")
    parser.add_argument("--gsm8k"), parser.add_argument("--alpaca"), parser.add_argument("--pairs")
    parser.add_argument("--random", choices=["8b"], help="a random model of this shape in 4-bit, on a GPU")
    parser.add_argument("--scratch", default="/tmp", help="where the random model is saved")
    parser.add_argument("--share", type=float, default=1.0, help="share of the batches of each side to run")
    parser.add_argument("--retrieval", default="policy")
    parser.add_argument("--dtype")
    parser.add_argument("--groups", action="store_true", help="measure retrieval_groups on Alpaca too")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens after which a row is cut")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows per training step")
    parser.add_argument(
        "--pair-batch", type=int, default=BATCH, help="pairs per reference batch, where full logits of 16 do not fit"
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the files in docs/benchmarks; default: the machine")
    args = parser.parse_args()

    model, tokenizer, device, dtype, weights = load(args)
    machine = {
        "name": machine_name(),
        "model": "random 8B, 4-bit" if args.random else Path(args.model).name,
        "dtype": str(dtype)[6:],
        "threads": torch.get_num_threads(),
        "limit": matmul_limit(device, dtype),
        "weights": weights,
        "share": args.share,
        "retrieval": args.retrieval,
        "pair_batch": args.pair_batch,
    }
    engine = Engine(model, device=device)
    sources = [
        ("gsm8k", gsm8k, args.gsm8k, 1000, 200),
        ("alpaca", alpaca, args.alpaca, 800, 100),
        ("pairs", pairs, args.pairs, 250, 50),
    ]
    results, memory = [], None
    file = page(args.name or f"{machine['name']} {machine['model']}")
    for name, read, path, n, held in sources:
        if not path:
            continue
        rows = tokenise(tokenizer, read(path), args.max_length)[: n + held]
        n = min(n, len(rows) - held)
        if memory is None and not args.no_memory:
            memory = peak_memory(engine, rows, n, args)
            print(memory, flush=True)
        results += task(name, engine, tokenizer, rows, n, args)
        file.with_suffix(".json").write_text(json.dumps({"results": results, "memory": memory, "machine": machine}, indent=1))
        file.with_suffix(".md").write_text(report(results, memory, machine))
        plot(results, machine, file.with_suffix(".png"))
        print(report(results, memory, machine), flush=True)


if __name__ == "__main__":
    main()
