"""The block as it may be shown to others: what goes into run.json and checkpoints, which are often uploaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from ..config import ICAConfig

# Keys of a dataset entry, of any host, that say which rows were read. All others are left out: no list of the secret ones (`token`,
# `storage_options`, `headers`, …) could be complete.
KNOWN_KEYS = {
    "path",
    "name",
    "split",
    "revision",
    "data_files",
    "data_dir",
    "ds_type",
    "type",
    "shards",
    "shards_idx",
    "file_name",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
    "subset",
    "folder",
    "num_samples",
    "formatting",
    "ranking",
}


def public_block(config: ICAConfig) -> dict[str, Any]:
    """The block as JSON types, without credentials and without absolute paths.

    Of a holdout entry the known keys alone are kept. A path that is absolute, in a home or above the working directory is cut to its
    last part; a URL loses its user, password, query and fragment.
    """
    block = config.model_dump(mode="json", exclude={"holdout"})
    return {key: _public(value) for key, value in {"holdout": public_source(config.holdout), **block}.items()}


def public_source(holdout: Any) -> Any:
    """The block's `holdout` in the same way: a name, an entry, or a list of entries."""
    if isinstance(holdout, (list, tuple)):
        return [public_source(entry) for entry in holdout]
    if isinstance(holdout, Mapping):
        return {key: _public(value) for key, value in holdout.items() if key in KNOWN_KEYS and _plain(key, value)}
    return _public(holdout)


def public_name(text: str) -> str:
    """A path, hub id or URL without what others need not know."""
    text = text.rpartition("::")[2]  # fsspec's chains
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        parts = urlsplit(text)
        host = parts.netloc.rpartition("@")[2]
        return PurePosixPath(parts.path).name if parts.scheme == "file" else f"{parts.scheme}://{host}{parts.path}"
    text = re.sub(r"^[^/@\s]*:[^/@\s]*@", "", text)  # user:password@host:path
    windows = PureWindowsPath(text)
    path: PurePath = windows if windows.drive or "\\" in text else PurePosixPath(text)
    outside = path.is_absolute() or bool(windows.drive) or text.startswith("~") or ".." in path.parts
    return path.name if outside else text


def _plain(key: str, value: Any) -> bool:
    """Not an entry within the entry, which may hold anything: a prompt's template, options of a file system."""
    if isinstance(value, Mapping):
        return key == "data_files" and all(_plain("", item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_plain("", item) for item in value)
    return value is None or isinstance(value, (str, int, float))


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    return public_name(value) if isinstance(value, str) else value
