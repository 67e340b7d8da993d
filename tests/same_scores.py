"""One set of rows, holdout, model and seed whose ICA scores are the same through every host (chatml).

`same_scores.json` keeps them, so that environments that cannot share a process compare with each other.
To write it anew: `python tests/same_scores.py`, in any environment with transformers alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

import tiny

EXPECTED = Path(__file__).with_suffix(".json")
ROWS, HOLDOUT = tiny.sft_rows(10, seed=21), tiny.sft_rows(8, seed=22)
BLOCK = {"k": 3, "seed": 5, **tiny.NAMED}
TOLERANCE = 1e-3  # nats


def segments(row: dict) -> tuple[str, str]:
    """Prompt and answer as text; every host tokenises both, and supervises the answer to its last token."""
    text = tiny.make_tokenizer().apply_chat_template(row["messages"], tokenize=False)
    prompt = text[: text.index(row["messages"][1]["content"], text.index("assistant"))]
    return prompt, text[len(prompt) :]


def tokenised(row: dict) -> dict[str, list[int]]:
    tokenizer = tiny.make_tokenizer()
    prompt, answer = (tokenizer(part)["input_ids"] for part in segments(row))
    return {"input_ids": prompt + answer, "attention_mask": [1] * len(prompt + answer), "labels": [-100] * len(prompt) + answer}


def scores_of(trainer, callback) -> dict[str, dict]:
    """Train, and return what was scored before the first step, by the row's tokens."""
    trainer.train()
    table = pq.read_table(callback.files.folder / "scores.parquet").to_pylist()
    shown = [example.demonstration.tokens.tolist() for example in callback.holdout.examples]
    found = {}
    for line in table:
        if line["refresh"] == 0:
            tokens = callback.train[line["row"]].demonstration.tokens.tolist()
            found[json.dumps(tokens)] = {
                **{key: line[key] for key in ("base_logprob", "context_logprob", "score", "weight", "tokens")},
                "demonstrations": [shown[demo] for demo in line["demos"]],
            }
    return found


def check_same_scores(trainer, callback) -> float:
    """The scores agree with every other host's. Returns the largest difference in nats."""
    found, expected = scores_of(trainer, callback), json.loads(EXPECTED.read_text())
    assert found.keys() == expected.keys()
    worst = 0.0
    for row, line in expected.items():
        assert found[row]["demonstrations"] == line["demonstrations"] and found[row]["tokens"] == line["tokens"]
        worst = max(worst, *(abs(found[row][key] - line[key]) for key in ("base_logprob", "context_logprob", "score")))
        assert abs(found[row]["weight"] - line["weight"]) < 1e-3
    assert worst < TOLERANCE, worst
    return worst


if __name__ == "__main__":
    import tempfile

    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    import ica_plugin

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, report_to="none", save_strategy="no", use_cpu=True, max_steps=1)
        tokenizer = tiny.make_tokenizer()
        train, holdout = (Dataset.from_list([tokenised(row) for row in rows]) for rows in (ROWS, HOLDOUT))
        trainer = Trainer(
            tiny.make_model(),
            arguments,
            train_dataset=train,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        callback = ica_plugin.attach(trainer, BLOCK, holdout=holdout)
        EXPECTED.write_text(json.dumps(scores_of(trainer, callback), indent=1) + "\n")
