"""Tiny random vision-language models with their processors, and rows with small pictures: no download."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import tiny

VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

# Messages whose content is text, or a list of texts and images.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_IMAGE = "'<|vision_start|><|image_pad|><|vision_end|>'"


def qwen_processor(folder: Path):
    """A Qwen2-VL processor whose pictures of 56 by 28 pixels are two tokens; needs torchvision."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    # What a model of this type would have, which knows its image tokens by name.
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", *(AddedToken(token, special=True) for token in VISION_TOKENS)]}
    )
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 8}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**pixels),
        tokenizer,
        Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE.replace("IMAGE", QWEN_IMAGE),
    )


def save_qwen(folder: Path) -> Path:
    """Write a random Qwen2-VL with M-RoPE, two layers in the language model and one in the vision tower, as a model folder."""
    processor = qwen_processor(folder)
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), processor.tokenizer.convert_tokens_to_ids(VISION_TOKENS)))
    text = {
        **tiny.SIZES,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "initializer_range": 0.3}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **{f"{name}_token_id": value for name, value in ids.items()},
    )
    state = torch.get_rng_state()
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).float().save_pretrained(folder)
    torch.set_rng_state(state)
    processor.save_pretrained(folder)
    return folder


def llava_processor():
    """A LLaVA processor whose pictures are four tokens, on any backend."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", AddedToken("<image>", special=True)]})
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "'<image>'"),
    )


def make_llava() -> LlavaForConditionalGeneration:
    """A random LLaVA: two layers of Llama behind two of CLIP."""
    processor = llava_processor()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 32,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, initializer_range=0.3),
        text_config=tiny.make_config(),
        image_token_index=processor.image_token_id,
        image_seq_length=4,
        vision_feature_select_strategy="default",
    )
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).float()
    torch.set_rng_state(state)
    return model


def save_llava(folder: Path) -> Path:
    """Write it with its processor as a model folder."""
    make_llava().save_pretrained(folder)
    processor = llava_processor()
    processor.tokenizer.chat_template = processor.chat_template  # which Axolotl asks for
    processor.save_pretrained(folder)
    return folder


def image_rows(folder: Path, n: int, seed: int = 0) -> list[dict]:
    """Chats about pictures, which lie in `folder`, as LLaMA-Factory takes them; every row has the same number of tokens in text.

    The first two differ in their pictures alone; every third has two pictures, of two sizes.
    """
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        paths = []
        for j in range(1 + (i % 3 == 2)):
            paths.append(str(folder / f"{seed}-{i}-{j}.png"))
            picture(rng, height=28 * (1 + j)).save(paths[-1])
        question, answer = tiny.shuffled(rng), tiny.shuffled(rng)
        messages = [{"role": "user", "content": "<image>" * len(paths) + question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": paths})
    rows[1]["messages"] = rows[0]["messages"]
    return rows


def message_rows(folder: Path, n: int, seed: int = 0) -> list[dict]:
    """The same with the pictures among the messages, as Axolotl takes them."""

    def content(message: dict, paths: list[str]) -> list[dict]:
        images = [{"type": "image", "path": path} for path in paths if message["role"] == "user"]
        return [*images, {"type": "text", "text": message["content"].replace("<image>", "")}]

    return [
        {"messages": [{"role": m["role"], "content": content(m, row["images"])} for m in row["messages"]]}
        for row in image_rows(folder, n, seed)
    ]


def picture(rng: random.Random, width: int = 56, height: int = 28) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
