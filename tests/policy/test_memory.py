"""How much one forward holds, and what happens when it was too much."""

from __future__ import annotations

import gc
from types import SimpleNamespace

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
    assert sum(done) == sum(len(sequence.tokens) for sequence in sequences)
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
    engine.embeddings([s.unscored for s in sequences])
    assert held() <= before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, max allowed: 18.13 GB). Tried to allocate 1.50 GB."),
        RuntimeError("Invalid buffer size: 24.00 GB"),
        RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        MemoryError("std::bad_alloc"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_out_of_memory_in_any_words_halves_and_goes_on(error, monkeypatch):
    model = make_model().eval()
    engine = engine_with(model, "padded")
    sequences = rows(6)
    run = engine.path.token_logprobs

    def small(batch):
        if len(batch) > 5:
            raise error
        return run(batch)

    monkeypatch.setattr(engine.path, "token_logprobs", small)
    np.testing.assert_allclose(engine.logprobs(sequences), one_at_a_time(model, sequences), atol=2e-4)
    assert engine.budget.tokens < 4096


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("bad_alloc")])
def test_other_errors_are_raised_as_they_are(error, monkeypatch):
    engine = engine_with(make_model().eval(), "padded")

    def fails(batch):
        raise error

    monkeypatch.setattr(engine.path, "token_logprobs", fails)
    with pytest.raises(type(error)) as caught:
        engine.logprobs(rows(3))
    assert caught.value is error


def test_caches_of_any_device_are_emptied(monkeypatch):
    emptied = []
    fake = SimpleNamespace(
        is_initialized=lambda: True,
        empty_cache=lambda: emptied.append("npu"),
        get_rng_state=None,
        get_rng_state_all=lambda: [],
        set_rng_state_all=lambda states: None,
    )
    engine = engine_with(make_model().eval(), "padded")
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    engine.logprobs(rows(1))
    assert emptied
