"""Log-probs and embeddings of rows with images, of text rows beside them, and of both in one forward."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

import tiny_vision
from ica_plugin.data.read import read_examples
from ica_plugin.policy.engine import Engine
from ica_plugin.policy.memory import Budget
from ica_plugin.scorers.in_context import in_context

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def seen():
    """Rows, of which every third is text, and what the processor makes of each."""
    processor, rng = tiny_vision.llava_processor(), random.Random(0)
    batches = []
    for i in range(6):
        images = [tiny_vision.picture(rng) for _ in range(i % 3)]
        text = "<image>" * len(images) + tiny_vision.tiny.sentence(rng) + "<|im_start|>" + tiny_vision.tiny.sentence(rng)
        batch = dict(processor(text=[text], images=images or None, return_tensors="pt"))
        answer = int((batch["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids("<|im_start|>")).nonzero()[-1])
        labels = batch["input_ids"].clone()
        labels[:, : answer + 1] = -100
        batches.append({**batch, "labels": labels})
    return read_examples(Dataset.from_list([{"row": i} for i in range(6)]), lambda rows: batches[rows[0]["row"]]), batches


@torch.no_grad()
def outputs(model, batches: list[dict]):
    """Logits [T, V] and the decoder's last hidden states [T, H] of rows one after the other, alone in a forward."""
    inputs = {"input_ids": torch.cat([batch["input_ids"] for batch in batches], dim=1)}
    if pixels := [batch["pixel_values"] for batch in batches if "pixel_values" in batch]:
        inputs["pixel_values"] = torch.cat(pixels)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    out = base(**inputs, output_hidden_states=True)
    return out.logits[0].double(), base.model(**inputs).last_hidden_state[0].double()


@pytest.mark.parametrize("lora", [False, True])
def test_rows_with_images_beside_rows_of_text(seen, lora):
    rows, batches = seen
    model = tiny_vision.make_llava().eval()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    engine = Engine(model, device=CPU, budget=Budget(120, 120))
    order = [(row, shown) for row in range(6) for shown in ((), ((row + 1) % 6, (row + 2) % 6))]
    sequences = [in_context(rows[row].demonstration, [rows[other].demonstration for other in shown]) for row, shown in order]
    for (row, shown), sequence, found in zip(order, sequences, engine.logprobs(sequences), strict=True):
        logprobs = outputs(model, [batches[i] for i in (*shown, row)])[0].log_softmax(-1)
        at = np.flatnonzero(sequence.scored)
        assert found == pytest.approx(float(logprobs[at - 1, sequence.tokens[at]].sum()), abs=1e-3)
    plain = [row.demonstration for row in rows]
    for sequence, batch, vector in zip(plain, batches, engine.embeddings(plain), strict=True):
        hidden = outputs(model, [batch])[1].numpy()[: len(sequence.prompt)]
        weight = np.arange(1, len(hidden) + 1)
        np.testing.assert_allclose(vector, weight @ hidden / weight.sum(), atol=1e-4)
    blind = engine.embeddings([row.demonstration.unscored for row in rows[[0, 3]]])  # text alone takes the other path
    for row, vector in zip((0, 3), blind, strict=True):
        hidden = outputs(model, [batches[row]])[1].numpy()
        weight = np.arange(1, len(hidden) + 1)
        np.testing.assert_allclose(vector, weight @ hidden / weight.sum(), atol=1e-4)
