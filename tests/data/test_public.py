"""What of the block may be uploaded: known keys, no credentials, no absolute paths."""

import inspect
import json

import datasets
import pytest

from ica_plugin.config import ICAConfig, parse_config
from ica_plugin.data.public import KNOWN_KEYS, public_block, public_name
from leaks import SECRET, check_no_leak, entry_with_every_key


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("good.jsonl", "good.jsonl"),
        ("data/good.jsonl", "data/good.jsonl"),
        ("org/rows", "org/rows"),
        ("/home/someone/data/good.jsonl", "good.jsonl"),
        ("~/data/good.jsonl", "good.jsonl"),
        ("../../someone/good.jsonl", "good.jsonl"),
        ("C:\\Users\\someone\\good.jsonl", "good.jsonl"),
        ("\\\\server\\share\\good.jsonl", "good.jsonl"),
        ("file:///home/someone/good.jsonl", "good.jsonl"),
        ("s3://bucket/good.jsonl", "s3://bucket/good.jsonl"),
        ("https://me:pw@host.org:8080/a/good.jsonl?X-Signature=abc#token", "https://host.org:8080/a/good.jsonl"),
        ("hf://token@datasets/org/rows", "hf://datasets/org/rows"),
        ("simplecache::s3://key:pw@bucket/good.jsonl", "s3://bucket/good.jsonl"),
        ("me:pw@host:data/good.jsonl", "host:data/good.jsonl"),
        ("0.5*ica + likelihood", "0.5*ica + likelihood"),
        ("train[:3]", "train[:3]"),
    ],
)
def test_names(given, shown):
    assert public_name(given) == shown


def test_every_key_of_load_dataset():
    entry = entry_with_every_key(inspect.signature(datasets.load_dataset).parameters)
    for holdout in (entry, [{**entry, "name": "a"}, {**entry, "name": "b"}]):
        shown = check_no_leak(holdout)
        assert [{"path", "split", "revision"} <= one.keys() for one in (shown if isinstance(shown, list) else [shown])]


def test_values_within_values():
    files = {"train": [f"https://me:{SECRET}@host/a.json", "/home/SECRET/b.json"]}
    shown = check_no_leak(
        {"path": "json", "data_files": files, "type": {"system_prompt": SECRET}, "storage_options": {"key": SECRET}}
    )
    assert shown == {"path": "json", "data_files": {"train": ["https://host/a.json", "b.json"]}}


def test_the_rest_of_the_block():
    block = {
        "holdout": "good.jsonl",
        "weights": "/home/someone/w.parquet",
        "retrieval": "/home/someone/embedder",
        "holdout_adapter": {"path": "/home/someone/adapter", "r": 4},
        "k": 2,
    }
    shown = public_block(parse_config(block))
    assert shown["weights"] == "w.parquet" and shown["retrieval"] == "embedder" and shown["holdout_adapter"]["path"] == "adapter"
    assert shown["holdout"] == "good.jsonl" and shown["k"] == 2 and shown["holdout_adapter"]["r"] == 4
    assert shown.keys() == ICAConfig.model_fields.keys() and json.dumps(shown)
    assert public_block(parse_config({"weights": "quality"}))["holdout"] is None


def test_known_keys_hold_no_credentials():
    assert not {key for key in KNOWN_KEYS for word in ("token", "auth", "key", "secret", "option", "header") if word in key}
