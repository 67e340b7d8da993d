"""What is asked of a model's config."""

from __future__ import annotations

from typing import Any


def model_context(model: Any) -> int | None:
    """Tokens the model can attend to by its config; None where it names no limit."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None)
