"""The scoring engine: every path gives the log-probs of one row at a time, and training notices nothing."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ica_plugin.data.store import Example, Sequence
from ica_plugin.errors import ICAError
from ica_plugin.policy import logits as logits_module
from ica_plugin.policy import packed
from ica_plugin.policy.engine import Engine
from ica_plugin.policy.logits import label_logprobs
from ica_plugin.policy.memory import MAX_TOKENS, Budget, budget_for
from ica_plugin.policy.packed import PackedPath
from ica_plugin.policy.padded import PaddedPath
from ica_plugin.policy.trees import common_prefix, grow, split_into_trees
from ica_plugin.scorers.ica import ica_scores, in_context
from tiny import SIZES, make_model

CPU = torch.device("cpu")
TINY = SIZES | {"max_position_embeddings": 512}


def make(family: str, seed: int = 0, **settings):
    """A tiny random model of a family of transformers."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **settings})
    return AutoModelForCausalLM.from_config(config).float().eval()


def rows(n: int = 24, seed: int = 0, demonstrations: int = 4) -> list[Sequence]:
    """Base and context sequences of n rows that share a template and draw two of a few demonstrations."""
    rng = np.random.default_rng(seed)
    template = rng.integers(3, 512, size=4)
    shown = [np.concatenate([template, rng.integers(3, 512, size=rng.integers(8, 20))]) for _ in range(demonstrations)]
    sequences = []
    for _ in range(n):
        tokens = np.concatenate([template, rng.integers(3, 512, size=rng.integers(3, 16))])
        scored = rng.random(len(tokens)) < 0.6  # several turns
        scored[0], scored[-1] = False, True
        row = Sequence(tokens, scored)
        chosen = sorted(rng.choice(demonstrations, 2, replace=False))
        sequences += [row, in_context(row, [shown[i] for i in chosen])]
    return sequences


@torch.no_grad()
def one_at_a_time(model, sequences: list[Sequence]) -> np.ndarray:
    """The definition: one unpadded forward per sequence, float64 log-softmax."""
    values = []
    for sequence in sequences:
        logits = model(input_ids=torch.from_numpy(sequence.tokens)[None]).logits[0]
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        at = np.flatnonzero(sequence.scored)
        values.append(float(logprobs[at - 1, sequence.tokens[at]].sum()))
    return np.array(values)


def engine_with(model, path: str, **settings) -> Engine:
    engine = Engine(model, device=CPU, **settings)
    base = engine._base
    engine._chosen = PaddedPath(model, base, CPU) if path == "padded" else PackedPath(model, base, CPU, path)
    return engine


# Every path is exact.


@pytest.mark.parametrize("path", ["segments", "dense", "padded"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_paths_agree_with_one_row_at_a_time(path, batch_tokens):
    model = make_model().eval()
    sequences = rows()
    values = engine_with(model, path, budget=Budget(batch_tokens, batch_tokens)).logprobs(sequences)
    np.testing.assert_allclose(values, one_at_a_time(model, sequences), atol=2e-4)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Qwen3", dict(head_dim=16)),
        ("Gemma", dict(head_dim=16)),
        ("Olmo2", {}),
        ("Phi3", {}),
        ("Granite", {}),
        ("Cohere", {}),
        ("StableLm", {}),
        ("Qwen3Moe", dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
        ("GPTNeoX", {}),
        ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)),
    ],
)
def test_full_attention_models_are_packed_and_right(family, settings):
    model = make(family, **settings)
    engine = Engine(model, device=CPU)
    sequences = rows(10)
    np.testing.assert_allclose(engine.logprobs(sequences), one_at_a_time(model, sequences), atol=1e-3)
    assert isinstance(engine.path, PackedPath), family


@pytest.mark.parametrize(
    "family, settings, reason",
    [
        ("Mistral", dict(sliding_window=8), "sliding window"),
        ("Gemma3Text", dict(head_dim=16, sliding_window=8), "sliding"),
        (
            "Qwen3Next",
            dict(
                head_dim=16,
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=32,
                layer_types=["linear_attention", "full_attention"],
            ),
            "linear_attention",
        ),
        ("Mamba", dict(state_size=4), "linear_attention"),
        ("Bloom", dict(n_layer=2, n_head=4), "SDPA"),
    ],
)
def test_other_models_take_the_padded_path_and_are_right(family, settings, reason, caplog):
    model = make(family, **settings)
    engine = Engine(model, device=CPU, budget=Budget(300, 300))
    sequences = rows(10)
    with listening(caplog):
        values = engine.logprobs(sequences)
    np.testing.assert_allclose(values, one_at_a_time(model, sequences), atol=1e-3)
    assert isinstance(engine.path, PaddedPath)
    assert reason in caplog.text


def test_sliding_window_is_felt():
    """The case above would prove nothing if the window were longer than the rows."""
    sequences = rows(4)
    narrow, wide = make("Mistral", sliding_window=8), make("Mistral", sliding_window=None)
    assert np.abs(one_at_a_time(narrow, sequences) - one_at_a_time(wide, sequences)).max() > 0.1


@pytest.mark.parametrize("path", ["segments", "dense", "padded"])
def test_trained_lora(path):
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    before = one_at_a_time(model.eval(), rows(4))
    model.train()
    for _ in range(3):
        ids = torch.randint(3, 512, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = one_at_a_time(model.eval(), rows(4))
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(engine_with(model, path).logprobs(rows(4)), expected, atol=1e-3)


def test_lora_model_takes_the_packed_path():
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert isinstance(Engine(model, device=CPU).path, PackedPath)


def test_bfloat16_is_packed_and_close():
    model = make_model().eval().to(torch.bfloat16)
    sequences = rows()
    engine = Engine(model, device=CPU)
    padded = engine_with(model, "padded").logprobs(sequences)
    assert isinstance(engine.path, PackedPath)
    assert np.corrcoef(engine.logprobs(sequences), padded)[0, 1] > 0.999


@pytest.mark.parametrize("path", ["segments", "dense", "padded"])
def test_awkward_rows(path):
    """Equal rows, a row that begins another, a row without a scored token, a branch inside the response."""
    model = make_model().eval()
    tokens = np.random.default_rng(1).integers(3, 512, size=12)
    other = np.concatenate([tokens[:7], tokens[:3]])
    late = np.arange(12) >= 5
    sequences = [
        Sequence(tokens, late),
        Sequence(tokens, late),
        Sequence(tokens[:6], late[:6]),
        Sequence(tokens, np.zeros(12, bool)),
        Sequence(other, np.arange(10) >= 5),
        Sequence(tokens[:2], np.array([False, True])),
    ]
    values = engine_with(model, path).logprobs(sequences)
    np.testing.assert_allclose(values, one_at_a_time(model, sequences), atol=1e-4)
    assert values[3] == 0


def test_pairs_share_their_prompt():
    rng = np.random.default_rng(0)
    prompt, chosen, rejected = (rng.integers(3, 512, size=n) for n in (20, 6, 9))
    tree = grow(sorted([np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])], key=lambda r: r.tolist()))
    assert len(tree.tokens) == 20 + 6 + 9


def examples_and_demonstrations(kind: str, n: int = 12):
    rng = np.random.default_rng(3)

    def sequence(prompt):
        tokens = np.concatenate([prompt, rng.integers(3, 512, size=rng.integers(3, 9))])
        return Sequence(tokens, np.arange(len(tokens)) >= len(prompt))

    def example():
        prompt = rng.integers(3, 512, size=6)
        return Example(
            tuple(sequence(prompt) for _ in range(2 if kind == "pair" else 1)),
            kind,
            kind != "unpaired" or bool(rng.random() < 0.5),
        )

    holdout = [example() for _ in range(5)]
    return [example() for _ in range(n)], [sorted(rng.choice(5, 3, replace=False).tolist()) for _ in range(n)], holdout


@pytest.mark.parametrize("kind", ["sft", "pair", "unpaired"])
@pytest.mark.parametrize("length_normalize", [False, True])
def test_scores_by_both_paths_are_the_formula(kind, length_normalize):
    model = make_model().eval()
    examples, demonstrations, holdout = examples_and_demonstrations(kind)
    for path in ("segments", "dense", "padded"):
        scores = ica_scores(engine_with(model, path), examples, demonstrations, holdout, length_normalize=length_normalize)
        for i, example in enumerate(examples):
            shown = [holdout[d].demonstration.tokens for d in demonstrations[i]]
            base, context = (
                [one_at_a_time(model, [s])[0] / (s.scored.sum() if length_normalize else 1) for s in sequences]
                for sequences in (example.sequences, [in_context(s, shown) for s in example.sequences])
            )
            gain = np.subtract(context, base)
            expected = gain[0] - gain[1] if kind == "pair" else gain[0] if example.desirable else -gain[0]
            assert scores.score[i] == pytest.approx(expected, abs=2e-4)


def test_scores_do_not_depend_on_order_or_other_rows(monkeypatch):
    model = make_model().eval()
    examples, demonstrations, holdout = examples_and_demonstrations("sft", 20)
    engine = Engine(model, device=CPU, budget=Budget(200, 200))

    def score(index):
        chosen = [examples[i] for i in index], [demonstrations[i] for i in index]
        return ica_scores(engine, *chosen, holdout, length_normalize=False).score

    everything = score(range(20))
    permuted = np.random.default_rng(0).permutation(20)
    np.testing.assert_allclose(score(permuted), everything[permuted], atol=1e-4)
    np.testing.assert_allclose(score([4, 11]), everything[[4, 11]], atol=1e-4)
    monkeypatch.setattr("ica_plugin.scorers.ica.ROWS_PER_BLOCK", 3)
    np.testing.assert_allclose(score(range(20)), everything, atol=1e-4)


@pytest.mark.parametrize("path", ["segments", "dense", "padded"])
def test_embeddings(path):
    model = make_model().eval()
    prompts = [s.tokens for s in rows(6)]
    found = engine_with(model, path, budget=Budget(60, 60)).embeddings(prompts)
    for prompt, vector in zip(prompts, found, strict=True):
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=torch.from_numpy(prompt)[None]).last_hidden_state[0].double().numpy()
        weight = np.arange(1, len(prompt) + 1)
        np.testing.assert_allclose(vector, weight @ hidden / weight.sum(), atol=1e-4)


# Which path.


class listening:
    """The plugin's logger in caplog (it does not propagate)."""

    def __init__(self, caplog):
        from ica_plugin.log import get_logger

        self.logger, self.handler = get_logger(), caplog.handler

    def __enter__(self):
        self.logger.addHandler(self.handler)

    def __exit__(self, *_):
        self.logger.removeHandler(self.handler)


def test_path_is_logged_once(caplog):
    engine = Engine(make_model(), device=CPU)
    with listening(caplog):
        engine.logprobs(rows(2))
        engine.embeddings([rows(1)[0].tokens])
        engine.logprobs(rows(2))
    assert caplog.text.count("scoring path") == 1


def test_a_model_whose_siblings_see_each_other_is_not_packed(monkeypatch, caplog):
    model = make_model().eval()
    sequences = rows(6)
    monkeypatch.setattr(packed, "_sees", lambda length, new: np.ones((new, length), bool))
    engine = Engine(model, device=CPU)
    assert engine.path.attention == "dense"
    monkeypatch.setattr(packed, "_mask", lambda ends: torch.ones(len(ends), len(ends)).tril().bool())
    engine = Engine(model, device=CPU)
    with listening(caplog):
        np.testing.assert_allclose(engine.logprobs(sequences), one_at_a_time(model, sequences), atol=2e-4)
    assert isinstance(engine.path, PaddedPath)
    assert "differ from those of single rows" in caplog.text


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("path", ["segments", "dense"])
def test_the_run_keeps_its_own_attention(implementation, path):
    model = make_model().eval()
    model.set_attn_implementation(implementation)
    sequences = rows(6)
    engine = engine_with(model, path)
    np.testing.assert_allclose(engine.logprobs(sequences), one_at_a_time(model, sequences), atol=2e-4)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {implementation}


def test_attention_with_changes_is_refused():
    query = torch.zeros(1, 2, 3, 4)
    for name in ("softcap", "sliding_window", "s_aux", "position_bias"):
        with pytest.raises(NotImplementedError, match=name):
            packed._tree_attention(None, query, query, query, None, **{name: 1.0})


def test_prompt_tuning_is_refused():
    model = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ICAError, match="virtual tokens"):
        Engine(model, device=CPU)


# Trees.


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=30),
    st.integers(1, 60),
    st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_trees_hold_every_sequence_once_within_limits(raw, max_tokens, max_predictions):
    sequences = [np.array(row) for row in raw]
    needed = np.array([len(row) // 2 for row in raw])
    trees = split_into_trees(sequences, needed, cost=lambda m: 16 + m, max_tokens=max_tokens, max_predictions=max_predictions)
    assert sorted(i for tree in trees for i in tree) == list(range(len(raw)))
    for index in trees:
        tree = grow([sequences[i] for i in index])
        assert len(index) == 1 or (len(tree.tokens) <= max_tokens and needed[index].sum() <= max_predictions)
        prefixes = {tuple(sequences[i][:n]) for i in index for n in range(1, len(sequences[i]) + 1)}
        assert len(tree.tokens) == len(prefixes)
        mask = packed._mask(torch.from_numpy(tree.ends)).numpy()
        for i, path in zip(index, tree.paths, strict=True):
            assert (tree.tokens[path] == sequences[i]).all() and (tree.positions[path] == np.arange(len(path))).all()
            for at, node in enumerate(path):
                assert set(np.flatnonzero(mask[node])) == set(path[: at + 1])


def test_division_is_the_cheapest():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 3, size=rng.integers(2, 8)) for _ in range(9)]
    cost = lambda m: 3 + m + m**2 / 20  # noqa: E731
    trees = split_into_trees(sequences, np.zeros(9, int), cost=cost, max_tokens=1000, max_predictions=1)
    found = sum(cost(len(grow([sequences[i] for i in t]).tokens)) for t in trees)
    order = [i for tree in trees for i in tree]
    cheapest = np.inf
    for cuts in range(2**8):
        stops = [i + 1 for i in range(8) if cuts >> i & 1] + [9]
        parts = [order[a:b] for a, b in zip([0, *stops], stops)]
        cheapest = min(cheapest, sum(cost(len(grow([sequences[i] for i in p]).tokens)) for p in parts))
    assert found == pytest.approx(cheapest)


def test_common_prefix():
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2
    assert common_prefix(np.array([1, 2]), np.array([1, 2, 4])) == 2
    assert common_prefix(np.array([1]), np.array([2])) == 0


# Memory.


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


# Training notices nothing.


def test_scoring_leaves_training_untouched():
    model = make_model().train()
    model.lm_head.eval()
    ids = torch.randint(3, 512, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    engine = Engine(model, device=CPU)
    engine.logprobs(rows(4))
    engine.embeddings([s.tokens for s in rows(4)])
    assert model.training and model.model.training and not model.lm_head.training
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    assert packed._BRANCHES is None


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


def test_dropout_is_off_while_scoring():
    model = make_model(attention_dropout=0.5).train()
    engine = Engine(model, device=CPU)
    assert np.array_equal(engine.logprobs(rows(4)), engine.logprobs(rows(4)))
