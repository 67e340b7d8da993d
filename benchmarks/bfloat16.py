"""How far scores in bfloat16 are from float32, and how much of it more float32 inside the forward would save.

    python benchmarks/bfloat16.py --model SmolLM2-135M-Instruct --gsm8k gsm8k_train.jsonl

The same rows are scored by the engine in float32, by the engine in bfloat16 with more and more of the forward kept in
float32, and by the padded loop in bfloat16. Writes docs/benchmarks/bfloat16-<machine>.md.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ica_plugin.config import ICAConfig
from ica_plugin.data.holdout import check_holdout
from ica_plugin.policy.engine import Engine
from ica_plugin.weighting.retrieval import retrieve
from scoring import BATCH, K, Reference, flatten, gsm8k, machine_name, page, tokenise


def autocast():
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def float32_residual(model: nn.Module) -> None:
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())


def float32_logits(model: nn.Module) -> None:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        with torch.autocast(output.device.type, enabled=False):
            return nn.functional.linear(inputs[0].float(), module.weight.float())

    model.get_output_embeddings().register_forward_hook(hook)


def float32_both(model: nn.Module) -> None:
    float32_residual(model)
    float32_logits(model)


def unchanged(model: nn.Module) -> None:
    pass


# Name, precision of the weights, context of the forward, what is changed in the model.
VARIANTS: list[tuple[str, torch.dtype, Callable, Callable[[nn.Module], None]]] = [
    ("engine", torch.bfloat16, nullcontext, unchanged),
    ("engine, logits in float32", torch.bfloat16, nullcontext, float32_logits),
    ("engine, residual stream in float32", torch.bfloat16, autocast, float32_residual),
    ("engine, both in float32", torch.bfloat16, autocast, float32_both),
    ("engine, float32 weights under autocast", torch.float32, autocast, unchanged),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True), parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--rows", type=int, default=24), parser.add_argument("--holdout", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=1024), parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    examples = tokenise(tokenizer, gsm8k(args.gsm8k)[: 1000 + args.holdout], args.max_length)
    held, train = examples[-args.holdout :], random.Random(args.seed).sample(examples[: -args.holdout], args.rows)
    shown = retrieve(
        train,
        check_holdout("GSM8K", held, train, None),
        ICAConfig(holdout="unused", k=K, retrieval="bm25"),
        rows=list(range(len(train))),
        context=None,
        embed=None,
        decode=tokenizer.decode,
    )
    sequences = flatten(train, shown, held)

    def load(dtype: torch.dtype) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()

    def scores(logprobs: np.ndarray) -> np.ndarray:
        base, context = logprobs.reshape(-1, 2).T
        return context - base

    exact = scores(Engine(load(torch.float32), device=device).logprobs(sequences))
    found = {}
    for name, dtype, precision, change in VARIANTS:
        model = load(dtype)
        change(model)
        found[name] = scores(Engine(model, device=device, autocast=precision).logprobs(sequences))
        print(name, spearmanr(found[name], exact).statistic, flush=True)
    loop = Reference(load(torch.bfloat16), train, shown, held, BATCH)
    logprobs = {i: value for batch in loop.batches for i, value in loop.run(batch).items()}
    found["padded loop"] = scores(np.array([logprobs[i] for i in range(len(sequences))]))

    text = "\n".join(
        [
            f"# bfloat16 against float32 on {machine_name()}",
            "",
            f"{Path(args.model).name}, {len(train)} rows of GSM8K, {len(held)} in the holdout, demonstrations by bm25, k = {K}. Against the "
            f"engine in float32, whose scores have a standard deviation of {exact.std():.1f} nats.",
            "",
            "| in bfloat16 | mean difference, nats | largest | Spearman |",
            "|---|---|---|---|",
            *(
                f"| {name} | {np.abs(values - exact).mean():.2f} | {np.abs(values - exact).max():.2f} | "
                f"{spearmanr(values, exact).statistic:.3f} |"
                for name, values in found.items()
            ),
            "",
        ]
    )
    page(f"bfloat16 {machine_name()}").with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
