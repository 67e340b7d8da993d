"""Every scorer has the same shape, and the names that a config is checked by are those of the modules."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from ica_plugin import expression
from ica_plugin.errors import ICAError
from ica_plugin.policy.reference import Reference
from ica_plugin.scorers import REGISTRY, needs_of, require
from ica_plugin.scorers.needs import Needs
from tiny import make_model

SCORERS_PAGE = (Path(__file__).parents[2] / "docs" / "scorers.md").read_text()


def test_the_names_agree_with_the_modules():
    bands = expression.BAND_SCORERS
    assert set(REGISTRY) | set(bands) == set(expression.SCORERS) and not set(REGISTRY) & set(bands)
    assert {name for name, module in REGISTRY.items() if module.NEEDS.demonstrations} == expression.SHOWS_DEMONSTRATIONS
    assert all(part in REGISTRY for parts in bands.values() for part in parts)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_scorer_has_the_same_shape(name):
    module = REGISTRY[name]
    assert module.__name__ == f"ica_plugin.scorers.{name}" and module.NAME == name
    assert isinstance(module.NEEDS, Needs) and module.score.__doc__ and f"`{name}`" in SCORERS_PAGE
    papers = re.findall(r"\d{4}\.\d{5}", module.SOURCE)
    assert all(paper in SCORERS_PAGE or name == "irm" for paper in papers) and (papers or name == "random")


def test_reading_a_score_imports_neither_torch_nor_numpy():
    path = Path(expression.__file__)
    code = (
        "import sys, types, importlib.util\n"
        "package = types.ModuleType('ica_plugin'); package.__path__ = [sys.argv[1]]; sys.modules['ica_plugin'] = package\n"
        "import ica_plugin.expression as expression\n"
        "assert expression.parse_score('0.5*ica + likelihood')\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, str(path.parent)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_run_can_be_refused_before_anything_is_scored():
    whole, adapter = make_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ICAError, match="irm is defined for preference pairs, and this run trains on sft rows"):
        require(["ica-irm"], whole, "sft")
    with pytest.raises(ICAError, match="influence takes gradients .* trains the whole model"):
        require(["ica", "influence"], whole, "sft")
    require(["ica", "likelihood", "rds", "one_shot", "random"], whole, "pair")
    require(expression.SCORERS, get_peft_model(make_model(), adapter), "pair")
    require(["irm"], whole, "pair", Reference(model=make_model()))  # a reference of its own needs no adapter
    assert set(needs_of(["lossdiff-irm"])) == {"lossdiff", "irm"}
