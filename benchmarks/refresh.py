"""Refreshing by window against scoring once: the same rows, the same policy, both sides in turns.

    python benchmarks/refresh.py --model SmolLM2-135M-Instruct --alpaca alpaca_en_demo.json

A window's rows share demonstrations with fewer rows than all rows do, which is what windows cost; every row is scored
once either way. With `--share` below 1 only that share of the forwards is run, evenly spread by size. Retrieval is done once on
either side and counted in both. Writes docs/benchmarks/refresh-<machine>-<data>-<retrieval>.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ica_plugin.config import ICAConfig
from ica_plugin.data.holdout import check_holdout
from ica_plugin.data.store import Sequence
from ica_plugin.policy.engine import Engine
from ica_plugin.weighting.retrieval import retrieve
from scoring import K, Trees, alpaca, compare, flatten, gsm8k, machine_name, page, pairs, tokenise


class Windows(Trees):
    """The forwards of an epoch that is scored window by window."""

    def __init__(self, engine: Engine, sequences, windows: list[np.ndarray]):
        super().__init__(engine, sequences)
        passes = len(sequences) // sum(map(len, windows))  # two per row, four per pair
        self.batches = []
        for rows in windows:
            index = [passes * row + i for row in sorted(rows) for i in range(passes)]
            needed = np.array([int(sequences[i].scored.sum()) for i in index])
            trees = engine.path.split([sequences[i].tokens for i in index], needed, engine.budget)
            self.batches += [[index[i] for i in tree] for tree in trees]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--gsm8k"), data.add_argument("--alpaca"), data.add_argument("--pairs")
    parser.add_argument("--rows", type=int, default=800), parser.add_argument("--holdout", type=int, default=100)
    parser.add_argument("--windows", type=int, default=10, help="refreshes per epoch")
    parser.add_argument(
        "--groups", type=int, nargs="*", default=[0, 8], help="retrieval_groups; 0: each row its own demonstrations"
    )
    parser.add_argument("--retrieval", default="policy")
    parser.add_argument("--max-length", type=int, default=1024), parser.add_argument("--share", type=float, default=1.0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    engine = Engine(model, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sources = [("GSM8K", gsm8k, args.gsm8k), ("Alpaca", alpaca, args.alpaca), ("pairs", pairs, args.pairs)]
    name, raw = next((name, read(path)) for name, read, path in sources if path)
    examples = tokenise(tokenizer, raw[: args.rows + args.holdout], args.max_length)
    train, held = examples[: -args.holdout], examples[-args.holdout :]
    holdout = check_holdout(name, held, train, None)
    vectors: dict[bytes, np.ndarray] = {}
    retrieval_seconds = 0.0

    def embed(asked: list[Sequence]) -> np.ndarray:
        nonlocal retrieval_seconds
        begin = time.perf_counter()
        new = {s.prompt.tobytes(): s for s in asked if s.prompt.tobytes() not in vectors}
        vectors.update(zip(new, engine.embeddings(list(new.values())) if new else [], strict=True))
        retrieval_seconds += time.perf_counter() - begin
        return np.stack([vectors[s.prompt.tobytes()] for s in asked])

    windows = np.array_split(np.random.default_rng(0).permutation(len(train)), args.windows)
    lines = []
    for groups in args.groups:
        config = ICAConfig(holdout="unused", k=K, retrieval=args.retrieval, retrieval_groups=groups or None)
        shown = retrieve(train, holdout, config, rows=list(range(len(train))), context=None, embed=embed, decode=tokenizer.decode)
        sequences = flatten(train, shown, held)
        stats, _ = compare({"once": Trees(engine, sequences), "windows": Windows(engine, sequences, windows)}, args.share, {})
        once, split = stats["once"], stats["windows"]
        whole = [retrieval_seconds + side["all_seconds"] for side in (once, split)]
        lines.append(
            f"| {groups or 'own'} | {once['all_tokens']:,} | {split['all_tokens']:,} | {split['all_tokens'] / once['all_tokens']:.2f} | "
            f"{whole[0]:,.0f} | {whole[1]:,.0f} | {whole[1] / whole[0]:.2f} |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(
        [
            f"# Refreshing {args.windows} times an epoch on {machine_name()}",
            "",
            f"{Path(args.model).name}, {len(train)} {'pairs' if name == 'pairs' else f'rows of {name}'}, {len(held)} in the holdout, "
            f"demonstrations by {args.retrieval}, k = {K}, "
            f"{torch.get_num_threads()} CPU thread(s), {args.share:.0%} of the forwards of each side run. Retrieval ({retrieval_seconds:,.0f} s) "
            "is in both times.",
            "",
            f"| demonstration sets | tokens, once | tokens, {args.windows} windows | ratio | seconds, once | seconds, windows | ratio |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    page(f"refresh {machine_name()} {name} {args.retrieval}").with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
