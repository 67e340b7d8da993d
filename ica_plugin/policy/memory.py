"""How much one scoring forward may hold: less than a training step does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

MAX_TOKENS = 8192
MAX_LOGITS = 2**28

# What allocators say that have no exception of their own; accelerate's list has the others. Lower case.
OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP, XPU, MPS, NPU, whatever follows the words
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, and cuDNN's, cuSOLVER's, cuSPARSE's
    "out_of_device_memory",  # oneAPI: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY
    "out_of_host_memory",
    "out_of_resources",
    "can't allocate memory",  # DefaultCPUAllocator on Linux
    "not enough memory",  # and on Windows
    "cannot allocate memory",  # mmap
    "bad_alloc",  # C++
    "invalid buffer size",  # MPS, for one tensor above Metal's limit
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in whatever words, that memory ran out, so that a smaller forward may succeed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return should_reduce_batch_size(error) or any(words in text for words in OUT_OF_MEMORY)


@dataclass(frozen=True)
class Budget:
    """Bounds of one forward. A single sequence above them is still scored, on its own.

    Attributes:
        tokens: tokens.
        predictions: positions with logits.
    """

    tokens: int
    predictions: int

    def halved(self, used: int) -> Budget:
        """Half of `used`, the tokens of a forward that ran out of memory, and half of the predictions."""
        return Budget(max(1, min(self.tokens, used) // 2), max(1, self.predictions // 2))


def budget_for(config: Any, device: torch.device, micro_batch_tokens: int) -> Budget:
    """The budget under which scoring peaks below the training step, counted in activations of the model's precision.

    A training step holds at least, per token, one hidden state per layer (gradient checkpointing), one layer in full and
    the logits. Scoring holds one layer without what backward needs, and logits at the scored positions alone. Half of
    what a training step holds goes to the layer, half to the logits, which are never above 2²⁸ elements (512 MB in
    bfloat16). On a GPU scoring also takes at most half of the memory that is free.

    Args:
        config: the model's.
        device: where it runs.
        micro_batch_tokens: padded tokens of the largest training micro-batch.
    """
    text = config.get_text_config()
    hidden, vocabulary = text.hidden_size, text.vocab_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    layer = 6 * hidden + 3 * inner
    held = micro_batch_tokens * (text.num_hidden_layers * hidden + 4 * hidden + layer + vocabulary)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        held = min(held, free // 2 // (getattr(config, "dtype", None) or torch.float32).itemsize)
    return Budget(
        tokens=int(min(MAX_TOKENS, max(1, held // 2 // layer))),
        predictions=int(max(1, min(MAX_LOGITS, held // 2) // vocabulary)),
    )
