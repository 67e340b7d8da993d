"""How much one forward holds, and what happens when it was too much."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from engines import CPU, engine_with, listening, one_at_a_time, rows
from ica_plugin.errors import ICAError
from ica_plugin.policy import logits as logits_module
from ica_plugin.policy.engine import Engine
from ica_plugin.policy.logits import label_logprobs
from ica_plugin.policy.memory import MAX_TOKENS, budget_for
from tiny import make_model


def test_label_logprobs_in_chunks(monkeypatch):
    values = torch.randn(13, 7)
    rows_, labels = torch.tensor([0, 5, 5, 12]), torch.tensor([1, 2, 6, 0])
    expected = torch.log_softmax(values, dim=1)[rows_, labels]
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", 20)
    torch.testing.assert_close(label_logprobs(values, rows_, labels), expected)


@pytest.mark.parametrize("path", ["segments", "padded"])
def test_out_of_memory_halves_and_goes_on(path, monkeypatch, caplog):
    model = make_model().eval()
    engine = engine_with(model, path)
    sequences = rows(12)
    run, sizes = engine.path.token_logprobs, []

    def small(batch):
        sizes.append(len(batch))
        if len(batch) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(batch)

    monkeypatch.setattr(engine.path, "token_logprobs", small)
    done = []
    with listening(caplog):
        values = engine.logprobs(sequences, done.append)
    np.testing.assert_allclose(values, one_at_a_time(model, sequences), atol=2e-4)
    assert sum(done) == len(sequences)
    assert "out of memory while scoring" in caplog.text
    again = engine.budget
    engine.logprobs(sequences)
    assert engine.budget == again and again.tokens < 4096


def test_one_row_too_large_says_what_to_do(monkeypatch):
    engine = Engine(make_model(), device=CPU)
    assert engine.path  # chosen before memory runs out

    def never(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.path, "token_logprobs", never)
    with pytest.raises(ICAError, match="Lower `ica.k`"):
        engine.logprobs(rows(3))


def test_budget_follows_the_training_batch():
    config = make_model().config
    small, large = (budget_for(config, CPU, tokens) for tokens in (64, 256))
    assert 0 < small.tokens < large.tokens and 0 < small.predictions < large.predictions
    assert budget_for(config, CPU, 10**9).tokens == MAX_TOKENS


def test_budget_on_a_gpu_stays_under_free_memory(monkeypatch):
    config = make_model().config
    for name, value in dict(mem_get_info=(2**20, 2**30), memory_reserved=0, memory_allocated=0).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    budget = budget_for(config, torch.device("cuda"), 10**6)
    layer, size = 6 * config.hidden_size + 3 * config.intermediate_size, 4
    assert size * (budget.tokens * layer + budget.predictions * config.vocab_size) <= 2**19


@pytest.mark.parametrize("path", ["segments", "dense", "padded"])
def test_scoring_holds_no_tensor_afterwards(path):
    def held() -> int:
        gc.collect()
        return sum(x.numel() * x.element_size() for x in gc.get_objects() if isinstance(x, torch.Tensor))

    engine = engine_with(make_model(), path)
    sequences = rows(4)
    before = held()
    engine.logprobs(sequences)
    engine.embeddings([s.tokens for s in sequences])
    assert held() <= before
