"""How many of a host's own example configs train with the `ica:` block added, by what their keys tell.

    python benchmarks/adoption.py --axolotl <its examples folder>             in an environment with Axolotl
    python benchmarks/adoption.py --llamafactory <its examples folder>        in one with LLaMA-Factory

Each config is given to the rules by which the plugin refuses a run before data or model are loaded; nothing is loaded or trained here.
The counts go into docs/hosts.md, between the marks of the host.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ica_plugin.config import parse_config
from ica_plugin.errors import V1, ICAError

PAGE = Path(__file__).parent.parent / "docs" / "hosts.md"
BLOCK = {"holdout": "good.jsonl"}

Found = list[tuple[Path, str]]  # a config, and why it is refused; "" where it trains


def configs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The yaml files that are configs of one run."""
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        try:
            keys = yaml.safe_load(path.read_text())
        except yaml.YAMLError:
            continue
        if isinstance(keys, dict):
            yield path, keys


def axolotl(folder: Path) -> Found:
    """Verdicts on Axolotl's examples: those with a base model and data."""
    from axolotl.utils.dict import DictDefault

    from ica_plugin.hosts.axolotl.args import refuse_unsupported

    training = [
        (path, keys)
        for path, keys in configs(folder)
        if "base_model" in keys and ("datasets" in keys or "pretraining_dataset" in keys)
    ]
    return [(path, why_refused(refuse_unsupported, DictDefault(keys | {"ica": BLOCK}))) for path, keys in training]


def llamafactory(folder: Path) -> Found:
    """Verdicts on LLaMA-Factory's examples: those that train."""
    from ica_plugin.hosts.llamafactory.attach import refuse_unsupported

    found = []
    for path, keys in configs(folder):
        if "model" in keys and "train_dataset" in keys:
            found.append((path, V1))
        elif keys.get("do_train") and "model_name_or_path" in keys:
            found.append((path, why_refused(lambda args: refuse_unsupported(args, parse_config(BLOCK)), keys)))
    return found


def why_refused(refuse: Callable[[Any], None], config: Any) -> str:
    """What a user reads; "" where nothing is refused."""
    try:
        refuse(config)
    except ICAError as error:
        return str(error)
    return ""


def table(found: Found) -> str:
    """Counts by what is refused, in the words of the message's beginning."""
    works = sum(not why for _, why in found)
    lines = [f"{works} of {len(found)} ({works / len(found):.0%}) train with the block added; refused, each in one message:", ""]
    reasons = Counter(re.split(r"[:.;,(]| is | are | trains ", why)[0].strip(" `") for _, why in found if why)
    return "\n".join(
        [*lines, "| what | configs |", "|---|---|", *(f"| {reason} | {count} |" for reason, count in reasons.most_common())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axolotl", type=Path), parser.add_argument("--llamafactory", type=Path)
    parser.add_argument("-v", "--verbose", action="store_true", help="each refused config with its message")
    args = parser.parse_args()
    text = PAGE.read_text()
    for name, verdicts in (("axolotl", axolotl), ("llamafactory", llamafactory)):
        folder = getattr(args, name)
        if folder is None:
            continue
        found = verdicts(folder)
        if not found:
            raise SystemExit(f"{folder}: no training config there.")
        print(name, table(found), sep="\n")
        if args.verbose:
            print(*(f"{path.relative_to(folder)}: {why}" for path, why in found if why), sep="\n")
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = re.sub(f"{start}.*?{end}", lambda _: f"{start}\n\n{table(found)}\n\n{end}", text, flags=re.S)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
