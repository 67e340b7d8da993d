"""The errors that a user is meant to read."""


class ICAError(ValueError):
    """A problem the user can act on: what is wrong, where, and what to do about it."""
