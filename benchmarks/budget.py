"""`budget`: what scoring takes of the training time, and how near the weights are to those of scoring every row.

    python benchmarks/budget.py --model SmolLM2-135M-Instruct --alpaca alpaca_en_demo.json

Runs a transformers Trainer with `budget` at several shares over the same rows from the same policy, and once scoring every
row. With `--small` the policy is a Llama of 2 layers with a vocabulary of 2,048, trained on the rows first (`--pretrain`
epochs), which takes minutes rather than hours; `--model` is then needed for its chat template alone. Writes
docs/benchmarks/budget-<machine>.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, LlamaConfig, Trainer, TrainingArguments

from ica_plugin import attach
from scoring import alpaca, gsm8k, machine_name, page, tokenise


def dataset(examples) -> Dataset:
    rows = []
    for example in examples:
        sequence = example.sequences[0]
        labels = np.where(sequence.scored, sequence.tokens, -100).tolist()
        rows.append({"input_ids": sequence.tokens.tolist(), "attention_mask": [1] * len(labels), "labels": labels})
    return Dataset.from_list(rows)


def train(model, tokenizer, rows: Dataset, folder: str, args, *, ica: dict | None = None, holdout=None, **settings):
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=args.batch,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        seed=0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer
    )
    callback = attach(trainer, ica, holdout=holdout) if ica else None
    trainer.train()
    return callback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--gsm8k"), parser.add_argument("--alpaca")
    parser.add_argument("--small", action="store_true"), parser.add_argument("--pretrain", type=float, default=3)
    parser.add_argument("--rows", type=int, default=800), parser.add_argument("--holdout", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=256), parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=1), parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--groups", type=int, help="retrieval_groups")
    args = parser.parse_args()

    raw = (gsm8k(args.gsm8k) if args.gsm8k else alpaca(args.alpaca))[: args.rows + args.holdout]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.small:
        tokenizer = tokenizer.train_new_from_iterator([f"{prompt}\n{answer[0]}" for prompt, answer in raw], 2048)
        tokenizer.pad_token = tokenizer.eos_token
    examples = tokenise(tokenizer, raw, args.max_length)
    rows, held = dataset(examples[: -args.holdout]), dataset(examples[-args.holdout :])
    if args.small:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        )
        first = argparse.Namespace(**{**vars(args), "epochs": args.pretrain, "learning_rate": 1e-3})
        train(model, tokenizer, rows, tempfile.mkdtemp(), first)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    lines, runs = [], []
    keys = {"retrieval_groups": args.groups} if args.groups else {}
    exact = None
    for budget in (None, *args.budgets):
        folder = tempfile.mkdtemp()
        settings = {} if budget else {"max_steps": 1}  # the weights of the start are all that is wanted of the exact run
        callback = train(
            copy.deepcopy(model), tokenizer, rows, folder, args, ica={"budget": budget, **keys}, holdout=held, **settings
        )
        record = json.loads((Path(folder) / "ica" / "run.json").read_text())
        weights = callback.weights.numpy()
        if budget is None:
            exact, exact_seconds = weights, record["scoring_seconds"]
            continue
        share = record["scoring_seconds"] / record["training_seconds"]
        runs.append(
            {
                "budget": budget,
                "steps": record["steps"],
                "scoring_seconds": record["scoring_seconds"],
                "training_seconds": record["training_seconds"],
                "share_of_training": share,
                "rows_scored": record["scored_rows"],
                "rows": len(rows),
                "leave_one_out": record["neighbour_correlation"],
                "spearman": float(spearmanr(weights, exact).statistic),
                "pearson": float(np.corrcoef(weights, exact)[0, 1]),
            }
        )
        r, loo = runs[-1], runs[-1]["leave_one_out"]
        lines.append(
            f"| {budget:g} | {r['steps']} | {r['training_seconds']:.0f} | {r['scoring_seconds']:.1f} | {share:.1%} | "
            f"{r['rows_scored']} of {r['rows']} | {'–' if loo is None else format(loo, '.2f')} | {r['spearman']:.2f} | {r['pearson']:.2f} |"
        )
        print(r, flush=True)
    policy = (
        f"a Llama of 2 layers, width 128, trained on the rows for {args.pretrain:g} epochs"
        if args.small
        else Path(args.model).name
    )
    text = "\n".join(
        [
            f"# A scoring budget on {machine_name()}",
            "",
            f"{policy}, {torch.get_num_threads()} CPU thread(s); {len(rows)} rows of {'GSM8K' if args.gsm8k else 'Alpaca'}, {len(held)} in the "
            f"holdout, batch {args.batch}, `refresh_interval: never`. Scoring every row took {exact_seconds:.0f} s.",
            "",
            "| budget | steps | training, s | scoring, s | share | rows scored | leave-one-out | rank correlation with the exact weights, all rows | Pearson |",
            "|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    file = page(f"budget {machine_name()}")
    file.with_suffix(".md").write_text(text)
    file.with_suffix(".json").write_text(
        json.dumps(
            {"runs": runs, "arguments": {k: v for k, v in vars(args).items() if k not in ("model", "gsm8k", "alpaca")}}, indent=1
        )
    )
    print(text)


if __name__ == "__main__":
    main()
