"""A holdout entry with a credential in every key, and the check that none gets out."""

from __future__ import annotations

import json
from collections.abc import Iterable

from ica_plugin.config import parse_config
from ica_plugin.data.public import KNOWN_KEYS, public_block

SECRET = "hf_s3cr3t"
# What may stand in keys that say where rows are: a path of this machine, or a URL with credentials.
PLACES = ("/home/SECRET/rows.jsonl", f"https://me:{SECRET}@host/rows.jsonl?token={SECRET}", f"https://{SECRET}@host/rows.jsonl")


def entry_with_every_key(keys: Iterable[str]) -> dict:
    """A value with something secret for each key of a host's dataset entry, and for some that hosts do not know."""
    keys = [*keys, "token", "use_auth_token", "api_key", "password", "storage_options", "headers", "an_unknown_key"]
    return {key: PLACES[i % len(PLACES)] if key in KNOWN_KEYS else SECRET for i, key in enumerate(keys)}


def check_no_leak(holdout: dict | list) -> dict | list:
    """The block's `holdout` as it may be shown; nothing secret is in the block."""
    block = public_block(parse_config({"holdout": holdout}))
    text = json.dumps(block)
    assert SECRET not in text and "SECRET" not in text and "/home" not in text
    return block["holdout"]
