"""Each scorer's formula, written out with one forward or backward per row, and small contexts to score in."""

from __future__ import annotations

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from ica_plugin.config import parse_config
from ica_plugin.data.holdout import check_holdout
from ica_plugin.data.store import Example, Sequence
from ica_plugin.policy.engine import Engine
from ica_plugin.scorers import scores_for, total_score
from ica_plugin.scorers.context import ScoringContext
from ica_plugin.scorers.in_context import in_context
from tiny import make_model

CPU = torch.device("cpu")
BETA = 0.3


def make_examples(kind: str, n: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)

    def response(prompt):
        tokens = np.concatenate([prompt, rng.integers(3, 512, size=rng.integers(3, 9))])
        return Sequence(tokens, np.arange(len(tokens)) >= len(prompt))

    def example(i):
        prompt = rng.integers(3, 512, size=6)
        sequences = tuple(response(prompt) for _ in range(2 if kind == "pair" else 1))
        return Example(sequences, kind, kind != "unpaired" or i % 3 != 0)

    return [example(i) for i in range(n)]


def make_lora(trained: bool = True, seed: int = 0):
    """A tiny model with a LoRA whose B is not zero, as after some training."""
    torch.manual_seed(seed)
    model = get_peft_model(
        make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.2, task_type="CAUSAL_LM")
    )
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def make_context(score: str, kind: str = "sft", model=None, n: int = 8, **settings) -> ScoringContext:
    config = parse_config({"holdout": "x", "score": score, "drop_tokens": None, **settings})
    train, good = make_examples(kind, n, 1), make_examples(kind, 5, 2)
    holdout = check_holdout("x", good, train, None)
    rng = np.random.default_rng(3)
    model = model if model is not None else make_lora()
    return ScoringContext(
        engine=Engine(model, device=CPU),
        config=config,
        train=train,
        rows=list(range(n)),
        demonstrations=[sorted(rng.choice(holdout.shown, 2, replace=False).tolist()) for _ in range(n)],
        holdout=holdout,
        length_normalize=bool(config.length_normalize),
        beta=BETA,
    )


def score(context: ScoringContext) -> np.ndarray:
    return total_score(context.config, scores_for(context))


def logprob(model, sequence: Sequence) -> torch.Tensor:
    """Summed log-prob of the scored tokens, from all logits in float64."""
    model.eval()
    logprobs = torch.log_softmax(model(input_ids=torch.from_numpy(sequence.tokens)[None]).logits[0].double(), dim=-1)
    at = np.flatnonzero(sequence.scored)
    return logprobs[at - 1, sequence.tokens[at]].sum()


def mean_logprob(model, row: Example, shown=()) -> float:
    """Per token; for pairs chosen minus rejected."""
    with torch.no_grad():
        values = [float(logprob(model, in_context(s, list(shown)))) / int(s.scored.sum()) for s in row.sequences]
    return values[0] if len(values) == 1 else values[0] - values[1]


def reference_margin(model, row: Example) -> float:
    with torch.no_grad(), model.disable_adapter():
        return float(logprob(model, row.sequences[0]) - logprob(model, row.sequences[1]))


def row_loss(model, row: Example, reference: float | None = None) -> torch.Tensor:
    sums = [logprob(model, s) for s in row.sequences]
    if row.kind != "pair":
        return -sums[0] / int(row.sequences[0].scored.sum())
    if reference is None:
        margin = sums[0] / int(row.sequences[0].scored.sum()) - sums[1] / int(row.sequences[1].scored.sum())
    else:
        margin = sums[0] - sums[1] - reference
    return -torch.log(torch.sigmoid(BETA * margin))


def gradient(model, row: Example, length_normalize: bool = False) -> list[np.ndarray]:
    reference = reference_margin(model, row) if row.kind == "pair" and not length_normalize else None
    model.zero_grad()
    row_loss(model, row, reference).backward()
    found = [p.grad.double().numpy().copy() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def sign(row: Example) -> int:
    return 1 if row.desirable else -1
