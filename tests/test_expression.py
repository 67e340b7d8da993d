"""What stands under `score:`."""

from __future__ import annotations

import pytest

from ica_plugin.config import parse_config
from ica_plugin.errors import ICAError
from ica_plugin.expression import parse_score


@pytest.mark.parametrize(
    "text, terms",
    [
        ("ica", ((1.0, "ica"),)),
        ("ica + likelihood", ((1.0, "ica"), (1.0, "likelihood"))),
        ("0.5*ica+2e-1 * ica-irm", ((0.5, "ica"), (0.2, "ica-irm"))),
        ("ica - 0.5*likelihood", ((1.0, "ica"), (-0.5, "likelihood"))),
        ("ica-0.5*likelihood", ((1.0, "ica"), (-0.5, "likelihood"))),
        ("-ica", ((-1.0, "ica"),)),
        ("- 2*ica -likelihood + ica-irm", ((-2.0, "ica"), (-1.0, "likelihood"), (1.0, "ica-irm"))),
    ],
)
def test_expressions(text, terms):
    assert parse_score(text) == terms


@pytest.mark.parametrize(
    "text, message",
    [
        ("likelyhood", "did you mean `likelihood`"),
        ("ica + ", "is not a scorer"),
        ("ica likelihood", "is not a scorer"),
        ("ica -", "is not a scorer"),
        ("ica-likelihood", "to subtract, write `ica - likelihood`"),
        ("likelihood - ica-irm", "give it no minus"),
        ("ica + ica", "twice"),
        ("0*ica", "and not 0"),
        ("1.2.3*ica", "must be a number"),
        ("--ica", "is not a scorer"),
        ("", "is not a scorer"),
    ],
)
def test_wrong_expressions(text, message):
    with pytest.raises(ICAError, match="ica.score") as error:
        parse_config({"holdout": "x", "score": text})
    assert message in str(error.value)


@pytest.mark.parametrize(
    "holdout, message",
    [
        ([], "a `name` of its own"),
        ([{"path": "a"}], "a `name` of its own"),
        ([{"name": "a", "path": "a"}, {"name": "a", "path": "b"}], "a `name` of its own"),
        ([{"name": "a"}], "needs a `path`"),
    ],
)
def test_wrong_sets(holdout, message):
    with pytest.raises(ICAError, match=message):
        parse_config({"holdout": holdout})


def test_several_sets_and_a_band_of_depths():
    sets = [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}]
    with pytest.raises(ICAError, match="goes with one holdout alone; with several use `top`"):
        parse_config({"holdout": sets, "score": "ica-irm", "weighting": "band"})
    parse_config({"holdout": sets, "score": "ica-irm", "weighting": "top"})
