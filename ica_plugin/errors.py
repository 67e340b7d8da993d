"""The errors that a user is meant to read."""

from __future__ import annotations


class ICAError(ValueError):
    """A problem the user can act on: what is wrong, where, and what to do about it."""
