import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from ica_plugin.errors import ICAError
from ica_plugin.policy.decoder import decoder_of
from ica_plugin.training.injection import GradientInjection, scale_gradient

TOKENS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([0.0, 0.5, 2.5])


def losses(model, tokens=TOKENS):
    logits = model(input_ids=tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(
        tokens.shape[0], -1
    )


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def lora(model):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return adapted


@pytest.mark.parametrize("prepare", [lambda m: m, lora], ids=["full", "lora"])
def test_a_loss_from_other_activations_is_refused_before_the_step(prepare):
    """As Axolotl's distillation: it takes `hidden_states[-1]` and the head's weight, and leaves the logits alone."""
    model = prepare(tiny.make_model())
    injection = GradientInjection(model)
    with injection.scaling(WEIGHTS):
        losses(model).mean().backward()
    injection.check_gradients()
    for _ in range(2):
        with injection.scaling(WEIGHTS):
            output = model(input_ids=TOKENS, output_hidden_states=True, logits_to_keep=1)
            (output.hidden_states[-1] @ model.get_output_embeddings().weight.T).logsumexp(-1).mean().backward()
    with pytest.raises(ICAError, match="the gradient of 2 micro-batch"):
        injection.check_gradients()
    injection.check_gradients()  # said once


def test_what_is_trained_may_change_between_micro_batches():
    """A callback unfreezes the output embedding, adds a LoRA to it, or freezes it again: each step is weighted exactly."""
    model = tiny.make_model()
    head = model.get_output_embeddings()
    head.requires_grad_(False)
    injection = GradientInjection(model)
    for trained in (False, True, True, False):
        head.requires_grad_(trained)
        with injection.scaling(WEIGHTS):
            loss = losses(model).mean()
        found = gradient(model, loss)
        injection.check_gradients()
        assert injection.on_logits == trained
        expected = gradient(model, (losses(model).mean(1) * WEIGHTS).mean())
        assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)
    head.requires_grad_(True)
    model.set_output_embeddings(torch.nn.Linear(32, 512, bias=False))  # another module, as a wrapper of PEFT's is
    with injection.scaling(WEIGHTS):
        loss = losses(model).mean()
    found = gradient(model, loss)
    expected = gradient(model, (losses(model).mean(1) * WEIGHTS).mean())
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)


def test_a_wrapper_that_names_a_whole_language_model_as_its_decoder():
    """Llama 4's: its `get_decoder()` has an output embedding of its own."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **sizes,
        "vocab_size": 512,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
    }
    vision = {
        **sizes,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = Llama4Config(text_config={**text, "pad_token_id": 0}, vision_config=vision)
    base = Llama4ForConditionalGeneration(config).float()
    assert type(decoder_of(base)).__name__ == "Llama4TextModel"
    target = ".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    with GradientInjection(model).scaling(WEIGHTS):
        loss = losses(model).mean()
    found = gradient(model, loss)
    expected = gradient(model, (losses(model).mean(1) * WEIGHTS).mean())
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)


@pytest.mark.parametrize("prepare", [lambda m: m, lora], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_weighted_exactly(prepare, tied):
    model = prepare(tiny.make_model(tie_word_embeddings=tied))
    injection = GradientInjection(model)
    assert injection.on_logits == (prepare is not lora)
    with injection.scaling(WEIGHTS):
        loss = losses(model).mean()
    found = gradient(model, loss)
    expected = gradient(model, (losses(model).mean(1) * WEIGHTS).mean())
    assert torch.linalg.norm(found - expected) < 1e-6 * torch.linalg.norm(expected)


def test_tokens_are_weighted_by_the_token_they_predict():
    model = tiny.make_model()
    per_token = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) * 3
    with GradientInjection(model).scaling(per_token):
        loss = losses(model).mean()
    found = gradient(model, loss)
    expected = gradient(model, (losses(model) * per_token[:, 1:]).mean())
    assert torch.linalg.norm(found - expected) < 1e-6 * torch.linalg.norm(expected)


def test_a_batch_of_pairs_repeats_the_weights():
    model = tiny.make_model()
    injection = GradientInjection(model)
    pairs = torch.cat([TOKENS, TOKENS.flip(1)])
    with injection.scaling(WEIGHTS):
        loss = losses(model, pairs).mean(1)
        loss = (loss[:3] - 2 * loss[3:]).mean()
    found = gradient(model, loss)
    rows = losses(model, pairs).mean(1)
    expected = gradient(model, (WEIGHTS * (rows[:3] - 2 * rows[3:])).mean())
    assert torch.linalg.norm(found - expected) < 1e-6 * torch.linalg.norm(expected)


def test_weights_one_change_no_bit_and_the_hook_rests_outside():
    model = tiny.make_model()
    plain = gradient(model, losses(model).mean())
    injection = GradientInjection(model)
    assert torch.equal(plain, gradient(model, losses(model).mean()))
    with injection.scaling(torch.ones(3)):
        loss = losses(model).mean()
    assert torch.equal(plain, gradient(model, loss))


def test_a_forward_without_gradient_is_not_a_training_forward():
    model = tiny.make_model()
    injection = GradientInjection(model)
    with pytest.raises(ICAError, match="did not pass through the model's output embedding"), injection.scaling(WEIGHTS):
        with torch.no_grad():
            losses(model)


def test_a_fused_loss_is_exact_while_the_output_embedding_is_frozen_and_refused_where_it_is_trained():
    def fused(model):  # as Liger and cut-cross-entropy do it: the decoder's output and the weight, never lm_head's forward
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = base.model(input_ids=TOKENS).last_hidden_state[:, :-1]
        logits = hidden @ base.lm_head.weight.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none").view(3, -1)

    frozen = lora(tiny.make_model())
    with GradientInjection(frozen).scaling(WEIGHTS):
        loss = fused(frozen).mean()
    found = gradient(frozen, loss)
    expected = gradient(frozen, (losses(frozen).mean(1) * WEIGHTS).mean())
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)

    trained = tiny.make_model()
    with pytest.raises(ICAError, match="fused linear cross-entropy"), GradientInjection(trained).scaling(WEIGHTS):
        fused(trained)


def test_lora_on_the_output_embedding_counts_as_trained():
    adapted = get_peft_model(tiny.make_model(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    injection = GradientInjection(adapted)
    assert injection.on_logits
    with injection.scaling(WEIGHTS):
        loss = losses(adapted).mean()
    found = gradient(adapted, loss)
    expected = gradient(adapted, (losses(adapted).mean(1) * WEIGHTS).mean())
    assert torch.linalg.norm(found - expected) < 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = tiny.make_model()
    expected = gradient(model, (losses(model).mean(1) * WEIGHTS).mean())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    with GradientInjection(model).scaling(WEIGHTS):
        loss = losses(model).mean()
    found = gradient(model, loss)
    assert torch.linalg.norm(found - expected) < 1e-6 * torch.linalg.norm(expected)


def test_a_compiled_model_is_weighted():
    model = tiny.make_model()
    expected = gradient(model, (losses(model).mean(1) * WEIGHTS).mean())
    injection = GradientInjection(model)
    compiled = torch.compile(model, backend="eager")
    with injection.scaling(WEIGHTS):
        loss = losses(compiled).mean()
    found = gradient(model, loss)
    assert torch.linalg.norm(found - expected) < 1e-6 * torch.linalg.norm(expected)


def test_weights_are_applied_in_float32_to_a_bfloat16_gradient():
    value = torch.ones(4, 2, 3, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.tensor([1.0, 1.001, 0.3333, 2.7])
    scale_gradient(value, weights).sum().backward()
    assert value.grad.dtype == torch.bfloat16
    assert torch.equal(value.grad, weights[:, None, None].expand(4, 2, 3).to(torch.bfloat16))


def test_rows_that_cannot_be_matched_stop():
    model = tiny.make_model()
    with pytest.raises(ICAError, match="cannot be matched.*padding_free"), GradientInjection(model).scaling(torch.ones(5)):
        losses(model)


def test_a_model_without_output_embedding_is_refused():
    with pytest.raises(ICAError, match="no output embedding"):
        GradientInjection(torch.nn.Linear(2, 2))
