"""The rules of the house, read from the source: which way imports run, how large a thing may be, what a start loads.

docs/design.md says why. Each rule names every offender at once.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ica_plugin"
BASE = "errors, log, versions, expression, block, config"
# A module imports from its own floor and from those before it.
FLOORS = [BASE, "data", "policy", "scorers", "weighting", "training", "run", "hosts", "tools"]
# What users import, and the command: they open the door to every floor, and nothing inside imports them.
DOORS = {"ica_plugin", "ica_plugin.__main__"}
HOSTS = {"axolotl", "llamafactory", "trl"}
HEAVY = {"torch", "transformers"}
FILE_LINES, CLASS_LINES, FUNCTION_LINES = 300, 200, 60
START_SECONDS = 1.0


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the package by its full name: its file and its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = (path, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imports(name: str) -> Iterator[tuple[str, int]]:
    """What a module imports anywhere in it, in functions and under TYPE_CHECKING too, with the line."""
    path, tree = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:  # `from . import x` is of the module x, where there is one
                inner = f"{source}.{alias.name}"
                yield (inner if inner in modules() else source), node.lineno


def floor(name: str) -> int:
    room = name.split(".")[1]
    if room in BASE.split(", "):
        return 0
    assert room in FLOORS, f"{name}: `{room}` is on no floor; put it in FLOORS and in docs/design.md"
    return FLOORS.index(room)


def place(name: str, line: int) -> str:
    return f"{modules()[name][0].relative_to(ROOT)}:{line}"


def test_imports_run_one_way():
    wrong = []
    for name in modules().keys() - DOORS:
        for target, line in imports(name):
            if target in DOORS:
                wrong.append(f"{place(name, line)} imports {target}, which is the door for users")
            elif target.split(".")[0] == "ica_plugin" and floor(target) > floor(name):
                wrong.append(f"{place(name, line)} imports {target}, which is on a later floor")
    assert not wrong, "\n".join(["imports against the order " + " < ".join(FLOORS), *sorted(wrong)])


def test_no_module_imports_itself_by_a_way_round():
    ways = {name: sorted({to for to, _ in imports(name) if to in modules()} - {name}) for name in modules().keys() - DOORS}
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [" → ".join([*path[path.index(name) :], name])]
        if name in done:
            return []
        found = [circle for to in ways.get(name, ()) for circle in walk(to, [*path, name])]
        done.add(name)
        return found

    circles = [circle for name in sorted(ways) for circle in walk(name, [])]
    assert not circles, "\n".join(["imports in a circle", *circles])


def test_core_modules_import_no_host():
    wrong = [
        f"{place(name, line)} imports {target}"
        for name in modules()
        if not name.startswith("ica_plugin.hosts.")
        for target, line in imports(name)
        if target.split(".")[0] in HOSTS
    ]
    assert not wrong, "\n".join(["only hosts/ may import a host", *sorted(wrong)])


def test_nothing_is_too_large_to_read_at_once():
    wrong = []
    for name, (path, tree) in modules().items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            wrong.append(f"{place(name, 1)} has {lines} lines, at most {FILE_LINES}")
        for node in ast.walk(tree):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                lines, limit = node.end_lineno - node.lineno + 1, CLASS_LINES if kind == "class" else FUNCTION_LINES
                if lines > limit:
                    wrong.append(f"{place(name, node.lineno)} {kind} {node.name} has {lines} lines, at most {limit}")
    assert not wrong, "\n".join(["one concern in one place", *sorted(wrong)])


def test_test_modules_have_names_of_their_own():
    """pytest imports them by that name alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1]


def test_pages_name_files_that_are_there():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    wrong = [
        f"{page.relative_to(ROOT)} names {path}"
        for page in pages
        for path in re.findall(
            r"(?<![\w/.-])(?:tests|ica_plugin|benchmarks|demo|docs|example_configs)/[\w/.-]+\.\w+", page.read_text("utf-8")
        )
        if not (ROOT / path).exists() and not (page.parent / path).exists()
    ]
    assert not wrong, "\n".join(sorted(wrong))


STARTS = {
    "import ica_plugin": "import ica_plugin",
    "from ica_plugin import ICAConfig": "from ica_plugin import ICAConfig; ICAConfig(holdout='x')",
    "ica-plugin --help": "import ica_plugin.tools.cli as cli\ntry: cli.app(['--help'])\nexcept SystemExit as end: assert not end.code",
}


@pytest.mark.parametrize("start", STARTS)
def test_a_start_loads_no_model_library_and_takes_no_time(start):
    code = f"{STARTS[start]}\nimport sys\nprint(*sorted({HEAVY} & sys.modules.keys()), sep=',', end='', file=sys.stderr)"
    seconds = []
    for _ in range(3):  # the first may find no compiled files, and the machine may be busy
        child = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        with child.stderr as stream:
            said = stream.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0, said
        assert said == "", f"`{start}` loads {said}"
        seconds.append(usage.ru_utime + usage.ru_stime)
        if seconds[-1] < START_SECONDS:
            break
    assert min(seconds) < START_SECONDS, f"`{start}` takes {min(seconds):.2f} s of CPU"
