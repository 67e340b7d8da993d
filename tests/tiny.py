"""A tiny random model and tokenizer, and small data sets: seconds, no download."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Keys of a block whose defaults follow the run; tests of the parts name what they are of.
NAMED = {"score": "ica", "weighting": "softmax", "apply": "gradient", "drop_tokens": None}
WORDS = "red green blue seven nine apples pears sum of and the cat sails home under a quiet moon counts".split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the chatml template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system \n" * 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        additional_special_tokens=["<|im_start|>"],
    )


# Of every tiny random model, whatever its architecture.
SIZES = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.3,
)


def make_config(**overrides) -> LlamaConfig:
    """A two-layer Llama of width 32."""
    settings = dict(max_position_embeddings=1024, tie_word_embeddings=False, attn_implementation="sdpa")
    return LlamaConfig(**{**SIZES, **settings, **overrides})


def make_model(seed: int = 0, **overrides):
    """A random model in float32; the same for the same seed."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(**overrides), attn_implementation="sdpa")
    torch.set_rng_state(state)
    return model.float()


def save_model(folder: Path, **overrides) -> Path:
    """Write model and tokenizer as an ordinary model folder."""
    make_model(**overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def sentence(rng: random.Random, low: int = 3, high: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def shuffled(rng: random.Random) -> str:
    """The same eight words in another order: always the same number of tokens."""
    words = WORDS[:8]
    rng.shuffle(words)
    return "x " + " ".join(words)


def sft_rows(n: int, seed: int = 0, turns: int = 1, equal: bool = False) -> list[dict]:
    """Chats; with `turns` > 1 every second one has a turn more; with `equal` all have the same token counts."""
    rng = random.Random(seed)
    text = shuffled if equal else sentence
    rows = []
    for i in range(n):
        messages = []
        for _ in range(turns + (i % 2 if turns > 1 else 0)):
            messages += [{"role": "user", "content": text(rng)}, {"role": "assistant", "content": text(rng)}]
        rows.append({"messages": messages})
    return rows


def pair_rows(n: int, seed: int = 0, equal: bool = False) -> list[dict]:
    """Preference pairs for Axolotl's `chat_template.default`."""
    rng = random.Random(seed)
    text = shuffled if equal else sentence
    return [
        {
            "messages": [{"role": "user", "content": text(rng)}],
            "chosen": {"role": "assistant", "content": text(rng)},
            "rejected": {"role": "assistant", "content": text(rng)},
        }
        for _ in range(n)
    ]


def argilla_rows(n: int, seed: int = 0, equal: bool = False) -> list[dict]:
    """The same pairs with whole conversations as chosen and rejected."""
    return [{side: [*row["messages"], row[side]] for side in ("chosen", "rejected")} for row in pair_rows(n, seed, equal)]


def kto_rows(n: int, seed: int = 0) -> list[dict]:
    """Unpaired rows, two of three desirable."""
    rng = random.Random(seed)
    return [{"instruction": sentence(rng), "completion": sentence(rng), "label": i % 3 != 0} for i in range(n)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
