"""Every path gives the log-probs of one row at a time, and the one taken is right for the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from engines import CPU, engine_with, listening, make, one_at_a_time, rows
from ica_plugin.data.store import Sequence
from ica_plugin.errors import ICAError
from ica_plugin.policy import packed
from ica_plugin.policy.engine import Engine
from ica_plugin.policy.memory import Budget
from ica_plugin.policy.packed import PackedPath
from ica_plugin.policy.padded import PaddedPath
from tiny import make_model


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


@pytest.mark.parametrize("attention", ["segments", "dense"])
@pytest.mark.parametrize("family, settings", [("Mistral", {}), ("Gemma3Text", dict(head_dim=16)), ("Phi3", {})])
def test_sliding_windows_are_packed_where_rows_fit_them(family, settings, attention):
    model = make(family, sliding_window=48, **settings)
    rng = np.random.default_rng(0)
    # Two rows that share a beginning, at each length around the window, in trees of far more tokens than it.
    sequences = []
    for length in (12, 30, 47, 48, 49, 60, 90):
        stem = rng.integers(3, 500, length - 6)
        for _ in range(2):
            tokens = np.concatenate([stem, rng.integers(3, 500, 6)])
            sequences.append(Sequence(tokens, np.arange(length) >= length - 8))
    if attention == "segments":
        assert isinstance(Engine(model, device=CPU).path, PackedPath)
    packed_engine, padded = engine_with(model, attention), engine_with(model, "padded")
    values = packed_engine.logprobs(sequences)
    np.testing.assert_allclose(values, padded.logprobs(sequences), atol=1e-3)
    np.testing.assert_allclose(values, one_at_a_time(model, sequences), atol=1e-3)
    trees = packed_engine.path.split([s.tokens for s in sequences], np.full(14, 8), Budget(4096, 4096))
    assert all(len(tree) == 1 for tree in trees if max(tree) >= 8), "longer rows stand alone"
    assert min(len(tree) for tree in trees if max(tree) < 8) >= 2, "rows that fit share trees"
    # The longer rows would come out otherwise without the window.
    wide = one_at_a_time(make(family, sliding_window=4096, **settings), sequences)
    assert np.abs(wide[10:] - values[10:]).max() > 0.05


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


@pytest.mark.parametrize("path", ["segments", "dense", "padded"])
def test_embeddings(path):
    model = make_model().eval()
    sequences = [s.unscored for s in rows(6)] + rows(3)
    prompts = [s.prompt for s in sequences]
    found = engine_with(model, path, budget=Budget(60, 60)).embeddings(sequences)
    for prompt, vector in zip(prompts, found, strict=True):
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=torch.from_numpy(prompt)[None]).last_hidden_state[0].double().numpy()
        weight = np.arange(1, len(prompt) + 1)
        np.testing.assert_allclose(vector, weight @ hidden / weight.sum(), atol=1e-4)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_model_that_sees_later_tokens_is_refused(ahead):
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, initializer_range=0.3, use_bidirectional_attention=ahead,
    )  # fmt: skip
    torch.manual_seed(0)
    engine = Engine(Gemma3ForCausalLM(config).eval(), device=CPU)
    if not ahead:
        assert np.isfinite(engine.logprobs(rows(2))).all()
        return
    with pytest.raises(ICAError, match="Gemma3ForCausalLM sees later tokens"):
        engine.logprobs(rows(2))


def test_path_is_logged_once(caplog):
    engine = Engine(make_model(), device=CPU)
    with listening(caplog):
        engine.logprobs(rows(2))
        engine.embeddings([rows(1)[0]])
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


def test_attention_with_changes_is_refused(monkeypatch):
    query = torch.zeros(1, 2, 3, 4)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(NotImplementedError, match=name):
            packed._tree_attention(None, query, query, query, None, **{name: 1.0})
    monkeypatch.setattr(packed, "_BRANCHES", [(slice(0, 3), torch.arange(3), torch.ones(3, 3, dtype=torch.bool).tril())])
    packed._tree_attention(None, query, query, query, None, sliding_window=3)
    with pytest.raises(NotImplementedError, match="longer than the sliding window"):
        packed._tree_attention(None, query, query, query, None, sliding_window=2)


def test_prompt_tuning_is_refused():
    model = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ICAError, match="virtual tokens"):
        Engine(model, device=CPU)


@torch.no_grad()
@pytest.mark.parametrize("path", ["segments", "dense"])
def test_a_tree_of_a_single_path_passes_no_mask(path):
    """SDPA has its fastest kernels for plain causal attention, and takes none of them beside a mask."""
    model = make_model().eval()
    taken, masks = PackedPath(model, model, CPU, path), []
    model.register_forward_pre_hook(lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True)
    tokens = np.random.default_rng(0).integers(3, 512, size=9)
    nested = [Sequence(tokens[:n], np.arange(n) >= 3) for n in (5, 9)]  # one begins the other: still a path
    other = Sequence(np.concatenate([tokens[:4], tokens[:3]]), np.arange(7) >= 3)
    layer = model.model.layers[0].self_attn
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.config._attn_implementation))
    for sequences, branches in (
        (nested[:1], False),
        (nested, False),
        (sorted([*nested, other], key=lambda s: s.tokens.tolist()), True),
    ):
        masks.clear()
        seen.clear()
        values = [float(v.sum()) for v in taken.token_logprobs(sequences)]
        assert (masks[-1] is not None) == (branches and path == "dense")
        assert seen[-1] == (packed.TREE_ATTENTION if branches and path == "segments" else "sdpa")
        np.testing.assert_allclose(values, one_at_a_time(model, sequences), atol=1e-4)
