"""Each scorer against its formula, written out with one forward or backward per row on a tiny random model."""

from __future__ import annotations

import copy
import random
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import rankdata

from ica_plugin.config import parse_config
from ica_plugin.data.holdout import check_holdout
from ica_plugin.data.store import Example, Sequence
from ica_plugin.errors import ICAError
from ica_plugin.expression import SCORERS, parse_score
from ica_plugin.policy.engine import Engine
from ica_plugin.scorers import scores_for, total_score
from ica_plugin.scorers.combine import balanced, combined, in_band
from ica_plugin.scorers.context import ScoringContext
from ica_plugin.scorers.ica import in_context
from ica_plugin.scorers.influence import truncated
from ica_plugin.weighting.weights import weights_from_scores
from tiny import make_model

CPU = torch.device("cpu")
BETA = 0.3


def make_examples(kind: str, n: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)

    def response(prompt):
        tokens = np.concatenate([prompt, rng.integers(3, 512, size=rng.integers(3, 9))])
        return Sequence(tokens, np.arange(len(tokens)) >= len(prompt))

    def example(i):
        prompt = rng.integers(3, 512, size=6)
        sequences = tuple(response(prompt) for _ in range(2 if kind == "pair" else 1))
        return Example(sequences, kind, kind != "unpaired" or i % 3 != 0)

    return [example(i) for i in range(n)]


def make_lora(trained: bool = True, seed: int = 0):
    """A tiny model with a LoRA whose B is not zero, as after some training."""
    torch.manual_seed(seed)
    model = get_peft_model(
        make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.2, task_type="CAUSAL_LM")
    )
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def make_context(score: str, kind: str = "sft", model=None, n: int = 8, **settings) -> ScoringContext:
    config = parse_config({"holdout": "x", "score": score, **settings})
    train, good = make_examples(kind, n, 1), make_examples(kind, 5, 2)
    holdout = check_holdout("x", good, train, None)
    rng = np.random.default_rng(3)
    model = model if model is not None else make_lora()
    return ScoringContext(
        engine=Engine(model, device=CPU),
        config=config,
        train=train,
        rows=list(range(n)),
        demonstrations=[sorted(rng.choice(holdout.shown, 2, replace=False).tolist()) for _ in range(n)],
        holdout=holdout,
        length_normalize=bool(config.length_normalize),
        beta=BETA,
    )


def score(context: ScoringContext) -> np.ndarray:
    return total_score(context.config, scores_for(context))


def logprob(model, sequence: Sequence) -> torch.Tensor:
    """Summed log-prob of the scored tokens, from all logits in float64."""
    model.eval()
    logprobs = torch.log_softmax(model(input_ids=torch.from_numpy(sequence.tokens)[None]).logits[0].double(), dim=-1)
    at = np.flatnonzero(sequence.scored)
    return logprobs[at - 1, sequence.tokens[at]].sum()


def mean_logprob(model, row: Example, shown=()) -> float:
    """Per token; for pairs chosen minus rejected."""
    with torch.no_grad():
        values = [float(logprob(model, in_context(s, list(shown)))) / int(s.scored.sum()) for s in row.sequences]
    return values[0] if len(values) == 1 else values[0] - values[1]


def reference_margin(model, row: Example) -> float:
    with torch.no_grad(), model.disable_adapter():
        return float(logprob(model, row.sequences[0]) - logprob(model, row.sequences[1]))


def row_loss(model, row: Example, reference: float | None = None) -> torch.Tensor:
    sums = [logprob(model, s) for s in row.sequences]
    if row.kind != "pair":
        return -sums[0] / int(row.sequences[0].scored.sum())
    if reference is None:
        margin = sums[0] / int(row.sequences[0].scored.sum()) - sums[1] / int(row.sequences[1].scored.sum())
    else:
        margin = sums[0] - sums[1] - reference
    return -torch.log(torch.sigmoid(BETA * margin))


def gradient(model, row: Example, length_normalize: bool = False) -> list[np.ndarray]:
    reference = reference_margin(model, row) if row.kind == "pair" and not length_normalize else None
    model.zero_grad()
    row_loss(model, row, reference).backward()
    found = [p.grad.double().numpy().copy() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def sign(row: Example) -> int:
    return 1 if row.desirable else -1


# Scorers made of log-probs and hidden states.


@pytest.mark.parametrize("kind", ["sft", "pair", "unpaired"])
def test_likelihood(kind):
    context = make_context("likelihood", kind)
    expected = [sign(row) * mean_logprob(context.engine.model, row) for row in context.train]
    np.testing.assert_allclose(score(context), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["sft", "pair", "unpaired"])
def test_one_shot(kind):
    context = make_context("one_shot", kind)
    model, holdout = context.engine.model, context.holdout.examples
    expected = [
        sign(row)
        * np.mean([mean_logprob(model, holdout[d], [row.demonstration.tokens]) - mean_logprob(model, holdout[d]) for d in demos])
        for row, demos in zip(context.train, context.demonstrations, strict=True)
    ]
    np.testing.assert_allclose(score(context), expected, atol=1e-4)


def test_one_shot_leaves_out_holdout_rows_that_do_not_fit():
    context = make_context("one_shot")
    context.demonstrations[0] = np.argsort([row.longest for row in context.holdout.examples])[[0, -1]].tolist()
    fits, _ = context.demonstrations[0]
    context.limit = len(context.train[0].demonstration.tokens) + context.holdout.examples[fits].longest
    model, holdout = context.engine.model, context.holdout.examples
    expected = mean_logprob(model, holdout[fits], [context.train[0].demonstration.tokens]) - mean_logprob(model, holdout[fits])
    assert score(context)[0] == pytest.approx(expected, abs=1e-4)
    again = make_context("one_shot")
    again.limit = 3
    assert np.isnan(score(again)).all()


def test_rds():
    context = make_context("rds")
    context.holdout.hidden_from[2] = frozenset(context.holdout.shown[1:])  # row 2 may be compared with one holdout row alone
    context.holdout.hidden_from[3] = frozenset(context.holdout.shown)
    model = context.engine.model.eval()

    def embedding(row: Example) -> np.ndarray:
        tokens = torch.from_numpy(row.demonstration.tokens)[None]
        with torch.no_grad():
            hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1][0].double().numpy()
        pooled = np.arange(1, len(hidden) + 1) @ hidden
        return pooled / np.linalg.norm(pooled)

    similarity = np.stack([embedding(r) for r in context.train]) @ np.stack([embedding(r) for r in context.holdout.examples]).T
    expected = similarity.max(axis=1)
    expected[2], expected[3] = similarity[2, 0], np.nan
    np.testing.assert_allclose(score(context), expected, atol=1e-5)


def test_random_is_the_rows_own():
    context = make_context("random")
    values = score(context)
    assert len(set(values)) == 8 and (0 <= values).all() and (values < 1).all()
    context.rows = [5, 2]
    del context.__dict__["examples"]
    np.testing.assert_array_equal(score(context), values[[5, 2]])
    assert not np.array_equal(score(make_context("random", seed=1)), values)


def test_irm():
    context = make_context("irm", "pair")
    model = context.engine.model
    expected = []
    for row in context.train:
        with torch.no_grad():
            policy = float(logprob(model, row.sequences[0]) - logprob(model, row.sequences[1]))
        expected.append(BETA * (policy - reference_margin(model, row)))
    np.testing.assert_allclose(score(context), expected, atol=1e-4)
    assert np.std(expected) > 0.01
    assert model.active_adapter == "default" and all(p.requires_grad == ("lora" in n) for n, p in model.named_parameters())


def test_irm_of_an_untrained_adapter_says_so(caplog):
    from test_engine import listening

    with listening(caplog):
        assert (score(make_context("irm", "pair", make_lora(trained=False))) == 0).all()
    assert "refresh_interval" in caplog.text


# RHO and LossDiff.


@pytest.mark.parametrize("kind, length_normalize", [("sft", False), ("pair", False), ("pair", True), ("unpaired", False)])
def test_rho_with_a_given_adapter(kind, length_normalize, tmp_path):
    other = make_lora(seed=7)
    other.save_pretrained(tmp_path)
    context = make_context("rho", kind, holdout_adapter={"path": str(tmp_path)}, length_normalize=length_normalize)
    model, expected = context.engine.model, []
    for row in context.train:
        reference = reference_margin(model, row) if kind == "pair" and not length_normalize else None
        with torch.no_grad():
            expected.append(sign(row) * float(row_loss(model, row, reference) - row_loss(other, row, reference)))
    np.testing.assert_allclose(score(context), expected, atol=1e-4)
    assert np.std(expected) > 0.01


def state_of(model) -> tuple:
    parameters = {
        name: (p.data_ptr(), p.detach().clone(), p.requires_grad, p.grad if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    }
    modes = [module.training for module in model.modules()]
    return (
        parameters,
        modes,
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),
        list(model.peft_config),
        model.active_adapter,
    )


def assert_same_state(found: tuple, expected: tuple) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, (pointer, value, trains, grad) in expected[0].items():
        now = found[0][name]
        assert now[0] == pointer and torch.equal(now[1], value) and now[2] == trains, name
        assert (now[3] is None and grad is None) or torch.equal(now[3], grad), name
    assert found[1] == expected[1]
    assert torch.equal(found[2], expected[2]) and found[3] == expected[3] and (found[4] == expected[4]).all()
    assert found[5:] == expected[5:]


@pytest.mark.parametrize(
    "name, kind", [("rho", "sft"), ("rho", "pair"), ("irm", "pair"), ("influence", "pair"), ("datainf", "sft")]
)
def test_training_notices_nothing(name, kind):
    model = make_lora()
    ids = torch.randint(3, 512, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    context = make_context(name, kind, model, holdout_adapter={"steps": 3})
    before = state_of(model)
    scores_for(context)
    assert_same_state(state_of(model), before)


def test_rho_trains_on_the_holdout_once_and_keeps_the_adapter():
    context = make_context("rho", holdout_adapter={"steps": 40, "learning_rate": 0.02, "r": 4})
    first = score(context)
    # The holdout rows themselves must have become much likelier than under the policy.
    own = make_context("rho", holdout_adapter={"steps": 40, "learning_rate": 0.02, "r": 4})
    own.train, own.rows = own.holdout.examples, list(range(5))
    own.kept["adapter"] = context.kept["adapter"]
    assert score(own).min() > 1.0 > np.median(first)
    again = make_context("rho", model=context.engine.model, holdout_adapter={"steps": 40, "learning_rate": 0.02, "r": 4})
    again.kept["adapter"] = context.kept["adapter"]
    np.testing.assert_allclose(score(again), first, atol=1e-5)
    fresh = make_context("rho", model=context.engine.model, holdout_adapter={"steps": 40, "learning_rate": 0.02, "r": 4})
    np.testing.assert_allclose(score(fresh), first, atol=1e-5)


# Gradients.


@pytest.mark.parametrize("kind, length_normalize", [("sft", False), ("pair", False), ("pair", True), ("unpaired", False)])
def test_influence(kind, length_normalize):
    context = make_context("influence", kind, length_normalize=length_normalize)
    model = context.engine.model
    shown = [gradient(model, row, length_normalize) for row in context.shown]
    target = [np.mean([g[i] for g in shown], axis=0) for i in range(len(shown[0]))]
    expected = [
        sign(row) * sum((g * t).sum() for g, t in zip(gradient(model, row, length_normalize), target, strict=True))
        for row in context.train
    ]
    np.testing.assert_allclose(score(context), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_influence_is_what_a_step_does():
    context = make_context("influence")
    values, model = score(context), context.engine.model
    with torch.no_grad():
        before = np.mean([float(row_loss(model, row)) for row in context.shown])
    for i in range(4):
        step = [1e-4 * torch.from_numpy(g).float() for g in gradient(model, context.train[i])]
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            [p.sub_(s) for p, s in zip(parameters, step, strict=True)]
            after = np.mean([float(row_loss(model, row)) for row in context.shown])
            [p.add_(s) for p, s in zip(parameters, step, strict=True)]
        assert (before - after) / 1e-4 == pytest.approx(values[i], rel=0.05, abs=0.02 * np.abs(values).max())


@pytest.mark.parametrize("steps", [0, 2])
def test_influence_by_adam(steps):
    """The direction is what torch's own Adam would step, from its own moments."""
    model = make_lora()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for seed in range(steps):
        for p, g in zip(parameters, gradient(model, make_examples("sft", 1, 50 + seed)[0]), strict=True):
            p.grad = torch.from_numpy(g).float()
        optimizer.step()
    context = make_context("influence", model=model, influence={"adam": True})
    context.optimizer = optimizer
    shown = [gradient(model, row) for row in context.shown]
    target = [np.mean([g[i] for g in shown], axis=0) for i in range(len(shown[0]))]
    saved = copy.deepcopy(optimizer.state_dict())
    start = [p.detach().clone() for p in parameters]
    expected = []
    for row in context.train[:4]:
        copied = torch.optim.Adam(parameters, lr=1.0)
        copied.load_state_dict({**copy.deepcopy(saved), "param_groups": copied.state_dict()["param_groups"]})
        for p, g in zip(parameters, gradient(model, row), strict=True):
            p.grad = torch.from_numpy(g).float()
        copied.step()
        expected.append(
            sum(float(((s - p).detach().double().numpy() * t).sum()) for p, s, t in zip(parameters, start, target, strict=True))
        )
        with torch.no_grad():
            [p.copy_(s) for p, s in zip(parameters, start, strict=True)]
        model.zero_grad()
    np.testing.assert_allclose(score(context)[:4], expected, rtol=2e-2, atol=5e-3 * np.abs(expected).max())


def test_influence_by_adam_needs_moments():
    model = make_lora()
    context = make_context("influence", model=model, influence={"adam": True})
    context.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    context.optimizer.step()
    with pytest.raises(ICAError, match="adamw_torch"):
        score(context)


@pytest.mark.parametrize("kind", ["sft", "pair", "unpaired"])
def test_datainf_is_the_mean_of_inverses(kind):
    context = make_context("datainf", kind)
    model = context.engine.model
    rows = [gradient(model, row) for row in context.train]
    shown = [gradient(model, row) for row in context.shown]
    expected = np.zeros(len(rows))
    for layer in range(len(rows[0])):
        g = np.stack([row[layer].ravel() for row in rows])
        v = np.mean([row[layer].ravel() for row in shown], axis=0)
        damping = 0.1 * (g**2).sum(axis=1).mean() / g.shape[1]
        inverse = np.mean([np.linalg.inv(damping * np.eye(g.shape[1]) + np.outer(x, x)) for x in g], axis=0)
        expected += g @ inverse @ v
    expected *= [sign(row) for row in context.train]
    np.testing.assert_allclose(score(context), expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())


def test_datainf_before_the_first_step(monkeypatch):
    """LoRA's A has no gradient then; and a sample of rows serves the Hessian where all are too many."""
    monkeypatch.setattr(sys.modules["ica_plugin.scorers.datainf"], "HESSIAN_ROWS", 3)
    values = score(make_context("datainf", model=make_lora(trained=False)))
    assert np.isfinite(values).all() and values.std() > 0


def test_truncated():
    scores = np.array([0.0, 1, 2, 3, np.nan, 4, 5, 6, 7, 8, 9])
    found = truncated(scores, (0.2, 0.8))
    np.testing.assert_array_equal(found, [2, 2, 2, 3, np.nan, 4, 5, 6, 7, 2, 2])
    np.testing.assert_array_equal(truncated(scores, None), scores)
    context = make_context("influence", influence={"truncate": [0.25, 0.75]})
    assert len(set(score(context))) < 8


# Sums and bands.


def test_a_sum_shares_the_base_pass():
    context = make_context("ica + 0.5*likelihood")
    seen = []
    logprobs = context.engine.logprobs
    context.engine.logprobs = lambda sequences, progress=None: seen.append(len(sequences)) or logprobs(sequences)
    columns = scores_for(context)
    assert seen == [16]  # eight rows, with and without their demonstrations
    ranks = rankdata(columns["ica"]) / 8 + 0.5 * rankdata(columns["likelihood"]) / 8
    np.testing.assert_allclose(total_score(context.config, columns), ranks)
    z = parse_config({"holdout": "x", "score": "ica + 0.5*likelihood", "combine": "zscore"})
    expected = sum(f * (columns[n] - columns[n].mean()) / columns[n].std() for f, n in ((1, "ica"), (0.5, "likelihood")))
    np.testing.assert_allclose(total_score(z, columns), expected)
    single = make_context("likelihood")
    np.testing.assert_allclose(scores_for(single)["base"], columns["base"], atol=1e-4)


def test_a_sum_without_all_its_parts_is_nan():
    found = combined(
        parse_score("ica+rds"), {"ica": np.array([1, np.nan, 3.0]), "rds": np.array([2.0, 1, 1])}, combine="rank", band=(0, 1)
    )
    np.testing.assert_array_equal(found, [1.5, np.nan, 1.5])


def test_band_scorers_keep_the_intersection():
    rng = np.random.default_rng(0)
    ica, irm = rng.normal(size=(2, 40))
    ica[7] = np.nan
    depth = in_band([ica, irm], (0.25, 0.75))
    finite = np.isfinite(ica)
    inside = [(rankdata(x[finite]) - 0.5) / 39 for x in (ica, irm)]
    expected = np.all([(q >= 0.25) & (q <= 0.75) for q in inside], axis=0)
    np.testing.assert_array_equal(depth[finite] >= 0, expected)
    assert np.isnan(depth[7]) and 5 < expected.sum() < 30
    config = parse_config({"holdout": "x", "score": "ica-irm", "weighting": "band"})
    weights = weights_from_scores(depth, config, tokens=np.full(40, 3), by_token=False)
    np.testing.assert_array_equal(weights.values[finite] > 0, expected)


def test_an_untrained_policy_leaves_the_band_to_the_other_scorer():
    depth = in_band([np.arange(8.0), np.zeros(8)], (0.25, 0.75))
    np.testing.assert_array_equal(depth >= 0, [False, False, True, True, True, True, False, False])


def test_a_factor_leaves_the_band_as_it_is():
    depths, tokens = np.linspace(-0.25, 0.25, 9), np.ones(9, int)
    kept = [
        weights_from_scores(
            depths, parse_config({"holdout": "x", "score": name, "weighting": "band"}), tokens=tokens, by_token=False
        )
        for name in ("ica-irm", "0.5*ica-irm")
    ]
    assert [(weights.values > 0).tolist() for weights in kept] == [(depths >= 0).tolist()] * 2


@pytest.mark.parametrize("name", ["ica-irm", "lossdiff-irm"])
def test_band_scorers_of_a_policy(name):
    context = make_context(name, "pair", holdout_adapter={"steps": 2})
    columns = scores_for(context)
    np.testing.assert_array_equal(
        total_score(context.config, columns), in_band([columns[name.split("-")[0]], columns["irm"]], (0.25, 0.75))
    )


@pytest.mark.parametrize(
    "text, terms",
    [
        ("ica", ((1.0, "ica"),)),
        ("ica + likelihood", ((1.0, "ica"), (1.0, "likelihood"))),
        ("0.5*ica+2e-1 * ica-irm", ((0.5, "ica"), (0.2, "ica-irm"))),
    ],
)
def test_expressions(text, terms):
    assert parse_score(text) == terms


@pytest.mark.parametrize(
    "text, message",
    [
        ("likelyhood", "did you mean `likelihood`"),
        ("ica + ", "is not a scorer"),
        ("ica - likelihood", "is not a scorer"),
        ("ica + ica", "twice"),
        ("0*ica", "above 0"),
        ("1.2.3*ica", "above 0"),
        ("-1*ica", "is not a scorer"),
        ("", "is not a scorer"),
    ],
)
def test_wrong_expressions(text, message):
    with pytest.raises(ICAError, match="ica.score") as error:
        parse_config({"holdout": "x", "score": text})
    assert message in str(error.value)


# Several holdout sets.


def test_balance():
    a, b = np.array([3.0, 2, 1, np.nan, 0]), np.array([0.0, 10, 20, np.nan, np.nan])
    z = [(x - x[np.isfinite(x)].mean()) / x[np.isfinite(x)].std() for x in (a, b)]
    mean = balanced([a, b], "mean", "zscore")
    np.testing.assert_allclose(mean[:3], (z[0] + z[1])[:3] / 2)
    assert np.isnan(mean[3]) and mean[4] == z[0][4]
    np.testing.assert_allclose(balanced([a, b], "max", "zscore")[:3], np.maximum(*z)[:3])
    # a takes row 0, b row 2, a row 1; row 4 is the last that anyone has
    turns = balanced([a, b], "round_robin", "rank")
    assert np.argsort(-turns[[0, 1, 2, 4]]).tolist() == [0, 2, 1, 3] and np.isnan(turns[3])


def test_two_holdout_sets_through_a_trainer(tmp_path):
    """Each set is scored apart, with its own demonstrations; equal to two runs with one set each, put together."""
    import pyarrow.parquet as pq

    from ica_plugin import attach
    from runs import build, tokenised

    for name, seed in (("maths", 9), ("code", 10)):
        tokenised(6, seed).save_to_disk(str(tmp_path / name))
    sets = [{"name": name, "path": str(tmp_path / name)} for name in ("maths", "code")]

    def table_of(folder, holdout):
        trainer = build(tmp_path / folder, None)
        attach(trainer, {"k": 2, "score": "ica + likelihood", "balance": "mean", "holdout": holdout})
        trainer.train()
        return pq.read_table(tmp_path / folder / "ica" / "scores.parquet").to_pydict()

    both, maths, code = table_of("both", sets), table_of("1", sets[0]["path"]), table_of("2", sets[1]["path"])
    np.testing.assert_allclose(both["ica:maths"], maths["ica"], atol=1e-4)
    np.testing.assert_allclose(both["ica:code"], code["ica"], atol=1e-4)
    expected = balanced([np.array(maths["score"]), np.array(code["score"])], "mean", "rank")
    np.testing.assert_allclose(both["score"], expected)
    assert both["demos"] == [m + [6 + d for d in c] for m, c in zip(maths["demos"], code["demos"], strict=True)]


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


# Where a scorer is not defined, and rows that cannot be scored.


@pytest.mark.parametrize(
    "name, kind, lora, message",
    [
        ("irm", "sft", True, "defined for preference pairs"),
        ("ica-irm", "unpaired", True, "defined for preference pairs"),
        ("irm", "pair", False, "trains the whole model"),
        ("rho", "sft", False, "trains the whole model"),
        ("influence", "sft", False, "trains the whole model"),
        ("datainf", "sft", False, "trains the whole model"),
    ],
)
def test_refusals(name, kind, lora, message):
    with pytest.raises(ICAError, match=message):
        score(make_context(name, kind, make_lora() if lora else make_model()))


@pytest.mark.parametrize("name, kind", [("rho", "sft"), ("irm", "pair")])
def test_an_adapter_that_took_a_part_of_the_base_is_no_reference(name, kind):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM")
    with pytest.raises(ICAError, match="`init_lora_weights: olora` moves a part of the base weights"):
        score(make_context(name, kind, get_peft_model(make_model(), adapter)))


def test_rho_trains_an_adapter_on_the_embedding_and_leaves_unused_parts():
    """LoRA of an embedding has no `.weight`, and a matrix that no row uses (an expert, a vision tower) has no gradient."""
    model = make_model()
    model.unused = torch.nn.Linear(4, 4)
    adapter = LoraConfig(r=4, target_modules=["embed_tokens", "unused"], task_type="CAUSAL_LM")
    context = make_context("rho", model=get_peft_model(model, adapter), holdout_adapter={"steps": 3, "learning_rate": 0.1})
    assert np.abs(score(context)).max() > 1e-3


def test_a_missing_holdout_adapter_is_named(tmp_path):
    with pytest.raises(ICAError, match="no PEFT adapter there"):
        score(make_context("rho", holdout_adapter={"path": str(tmp_path)}))


@pytest.mark.parametrize("name", [name for name in SCORERS if "irm" not in name])
def test_a_row_without_supervised_tokens_harms_no_other(name):
    context = make_context(name, holdout_adapter={"steps": 2})
    whole = score(context)
    other = make_context(name, holdout_adapter={"steps": 2}, model=context.engine.model)
    bare = other.train[3].sequences[0]
    other.train[3] = Example((Sequence(bare.tokens, np.zeros(len(bare.tokens), bool)),), "sft")
    found = score(other)
    assert np.isnan(found[3]) or name in ("rds", "random")
    if name != "datainf":  # whose Hessian is over the rows
        rest = np.arange(8) != 3
        np.testing.assert_allclose(found[rest], whole[rest], atol=1e-4, rtol=1e-4)


def test_zero_rows():
    """A rank whose window has no row of its own."""
    for name in SCORERS:
        context = make_context(name, "pair", holdout_adapter={"steps": 1})
        context.rows, context.demonstrations = [], []
        assert all(len(column) == 0 for column in scores_for(context).values()), name


def test_the_band_and_others_through_a_trainer(tmp_path):
    """A run with a sum writes a column per scorer; without demonstrations nothing is retrieved."""
    import pyarrow.parquet as pq

    from runs import run

    trainer = run(tmp_path / "sum", {"score": "ica + likelihood"})
    table = pq.read_table(tmp_path / "sum" / "ica" / "scores.parquet")
    assert table.column_names[-2:] == ["ica", "likelihood"]
    assert np.isfinite(table["weight"].to_numpy()).all() and trainer.state.global_step > 0
    run(tmp_path / "random", {"score": "random", "retrieval": "policy"})
    alone = pq.read_table(tmp_path / "random" / "ica" / "scores.parquet")
    assert alone["demos"].to_pylist() == [[]] * 22 and alone["weight"].to_numpy().std() > 0
    run(tmp_path / "ica", {})
    assert pq.read_table(tmp_path / "ica" / "ica" / "scores.parquet").column_names[-1] == "demos"


def test_a_run_with_every_adapter_scorer_and_equal_weights_is_the_plain_run(tmp_path):
    """Second adapters, gradients and refreshes between the steps change no bit of what is trained, dropout included."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from ica_plugin import attach
    from runs import tokenised
    from tiny import make_tokenizer

    ends = []
    for scored in (False, True):
        tokenizer, model = make_tokenizer(), make_lora()
        trainer = Trainer(
            model,
            TrainingArguments(
                str(tmp_path),
                use_cpu=True,
                report_to="none",
                max_steps=6,
                per_device_train_batch_size=2,
                seed=3,
                learning_rate=0.01,
            ),
            train_dataset=tokenised(12, 0),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        if scored:
            block = {
                "score": "rho + influence + datainf + likelihood",
                "weighting": "top",
                "keep": 1.0,
                "refresh_interval": 2,
                "refresh_scope": "all",
            }
            callback = attach(
                trainer, {**block, "influence": {"adam": True}, "holdout_adapter": {"steps": 2}}, holdout=tokenised(5, 9)
            )
        trainer.train()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert callback.state.counts.refreshes == 3 and ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_resumed_run_keeps_the_scorers_columns(tmp_path):
    import pyarrow.parquet as pq

    from runs import run

    block = {"score": "ica + likelihood", "refresh_interval": "epoch"}
    settings = {"save_strategy": "epoch"}
    run(tmp_path / "whole", block, **settings)
    run(tmp_path / "cut", block, **settings)
    run(tmp_path / "cut", block, resume=str(tmp_path / "cut" / "checkpoint-6"), **settings)
    whole, cut = (pq.read_table(tmp_path / name / "ica" / "scores.parquet") for name in ("whole", "cut"))
    assert whole.column_names == cut.column_names and whole.num_rows == cut.num_rows == 44
    for name in ("ica", "likelihood", "weight"):
        np.testing.assert_allclose(whole[name].to_numpy(), cut[name].to_numpy(), atol=1e-4)
