"""The errors that a user is meant to read."""

from __future__ import annotations


class ICAError(ValueError):
    """A problem the user can act on: what is wrong, where, and what to do about it."""


# Said by every command alike.
V1 = (
    "LLaMA-Factory's v1 engine (`USE_V1=1`) has a trainer of its own and no plugin for its loss, so rows cannot be weighted there. "
    "Write the config for the engine that it uses by default (`model_name_or_path`, `stage`, `do_train`) and unset USE_V1."
)
