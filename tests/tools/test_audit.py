"""`ica-plugin audit`: its numbers on a trainer, its corruptions on tokens."""

import json

import numpy as np
import pytest
import yaml
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import tiny
from ica_plugin import attach
from ica_plugin.data.store import Example, Sequence
from ica_plugin.errors import ICAError
from ica_plugin.run.files import ScoreFile
from ica_plugin.tools.audit import audit_numbers
from ica_plugin.tools.audit_page import row_table, sections
from ica_plugin.tools.audit_verdicts import verdicts
from ica_plugin.tools.measures import agreement, auroc
from ica_plugin.tools.noise import corrupted
from ica_plugin.tools.page import write_page
from ica_plugin.tools.sample import _without_prompt
from runs import tokenised


def make_callback(folder, block, holdout=None):
    tokenizer = tiny.make_tokenizer()
    model = get_peft_model(tiny.make_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), use_cpu=True, report_to="none"),
        train_dataset=tokenised(30, 0),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    return attach(trainer, tiny.NAMED | block, holdout=holdout)


def page_of(numbers, folder):
    out = folder / "audit.html"
    write_page(out, "Audit", sections(numbers), numbers, verdicts=verdicts(numbers), rows=row_table(numbers["rows"]))
    return out.read_text()


@pytest.fixture(scope="module")
def callback(tmp_path_factory):
    return make_callback(tmp_path_factory.mktemp("audit"), {"k": 2}, tokenised(8, 9))


def test_numbers_and_page(callback, tmp_path):
    numbers = audit_numbers(callback, rows=24, planted=10)
    assert numbers["data"]["rows in the sample"] == 24 and numbers["data"]["train rows"] == 30
    names = [line["scorer"] for line in numbers["scores"]]
    assert names == ["ica", "likelihood", "ica + likelihood", "one_shot", "rds", "random", "influence"]
    assert len(numbers["agreement"]) == 21 and [line["scorer"] for line in numbers["influence"]] == names[:-1]
    ica, likelihood = (np.array(numbers["values"][name]) for name in ("ica", "likelihood"))
    assert numbers["agreement"][0]["rank correlation"] == pytest.approx(spearmanr(ica, likelihood).statistic)
    assert {line["ICA with"] for line in numbers["sensitivity"]} >= {
        "k = 1",
        "k = 3",
        "the order turned round",
        "demonstrations at random",
        "one half of the holdout against the other",
    }
    assert all(0 <= line[name] <= 1 for line in numbers["noise"] for name in names)
    kinds = [line["corruption"] for line in numbers["noise"]]
    assert numbers["noise left out"] == {"altered numbers": 4} and "another row's answer" in kinds
    rng, rows = np.random.default_rng(0), numbers["noise"][0]["rows"]
    by_chance = [auroc(rng.normal(size=2 * rows), rows) for _ in range(3000)]
    assert float(numbers["noise"][0]["chance"].removeprefix("0.5 ± ")) == pytest.approx(2 * np.std(by_chance), rel=0.05)
    assert numbers["tokens"] and all(line["corruption"] in kinds for line in numbers["tokens"])
    for line in numbers["tokens"]:
        assert 0 < line["altered"] < line["tokens"] and all(0 <= line[way] <= 1 for way in ("in context", "without context"))
    best, worst = numbers["rows"][0], numbers["rows"][-1]
    assert best["ica"] == ica.max() and worst["ica"] == ica.min() and len(numbers["rows"]) == 24
    decode = callback.trainer.processing_class.decode
    assert decode(callback.train[best["row"]].sequences[0].tokens) == best["text"]
    (shown,) = callback.scoring.find_demonstrations([worst["row"]])
    assert all(decode(callback.holdout.examples[row].sequences[0].tokens) in worst["demonstrations"] for row in shown)
    assert np.mean([row["weight"] for row in numbers["rows"]]) == pytest.approx(1)
    page = page_of(numbers, tmp_path)
    assert page.count("data:image/png;base64,") == 3
    assert "0 ± 0.42 (two standard deviations) for the rank correlation of 24 rows" in page
    assert "altered numbers, which only 4 of the planted rows allow" in page
    assert json.loads((tmp_path / "audit.json").read_text())["data"]["kind"] == "sft"


def test_chosen_scorers_and_too_few_rows(callback):
    numbers = audit_numbers(callback, rows=20, planted=5, scorers=["likelihood"])
    assert [line["scorer"] for line in numbers["scores"]] == ["likelihood", "ica"] and numbers["influence"] == []
    few = callback.train
    callback.train = few[:10]
    try:
        with pytest.raises(ICAError, match="at least 20"):
            audit_numbers(callback, rows=20, planted=5)
    finally:
        callback.train = few


def test_several_holdout_sets_are_scored_as_a_run_scores_them(tmp_path):
    for name, seed in (("maths", 9), ("code", 10)):
        tokenised(8, seed).save_to_disk(str(tmp_path / name))
    sets = [{"name": name, "path": str(tmp_path / name)} for name in ("maths", "code")]
    callback = make_callback(tmp_path / "run", {"k": 2, "score": "ica + likelihood", "holdout": sets})
    numbers = audit_numbers(callback, rows=30, planted=10, scorers=["ica", "rho"])
    callback.refresh.files = ScoreFile(tmp_path / "scores.parquet")
    callback.refresh(list(range(30)), shared=False)
    np.testing.assert_allclose(numbers["values"]["ica + likelihood"], callback.state.scores, rtol=1e-5)
    assert all(0 <= line[name] <= 1 for line in numbers["noise"] for name in ("ica", "rho", "ica + likelihood"))
    halves = numbers["sensitivity"][-1]
    assert halves["ICA with"] == "one half of the holdout against the other" and halves["rank correlation"] < 0.999


def test_page_without_any_corruption_says_so(callback, tmp_path):
    numbers = audit_numbers(callback, rows=20, planted=4, scorers=["likelihood"])
    assert numbers["noise"] == [] and numbers["noise left out"]
    page = page_of(numbers, tmp_path)
    assert "Planted noise" in page and "another row&#39;s answer, which only" in page


def test_a_scorer_without_a_finite_score_is_said_to_have_none(tmp_path):
    """No demonstration fits the model's context, so that ICA has no score for any row; `np.quantile([])` raised an IndexError."""
    callback = make_callback(tmp_path, {"k": 2}, tokenised(8, 9))
    longest = int(callback.train.longest.max())
    callback.trainer.model.config.max_position_embeddings = longest + 1
    for scorers in (["likelihood"], ["one_shot"]):  # beside one that has scores, and where none has any
        numbers = audit_numbers(callback, rows=20, planted=5, scorers=scorers)
        described = {line["scorer"]: line for line in numbers["scores"]}
        assert described["ica"]["without a score"] == 20 and described["ica"]["mean"] is described["ica"]["q50"] is None
        assert all(np.isnan(row["weight"]) for row in numbers["rows"])
        assert "Without any finite score: " in page_of(numbers, tmp_path)
    assert described["one_shot"]["mean"] is None


def an_audit(**of_scorers):
    """Numbers as an audit has them, of which verdicts read these."""
    return {
        "data": {
            "score of the config": "ica + likelihood",
            "default score": "ica + likelihood",
            "holdout": "good.jsonl",
            "train rows": 1020,
            "without supervised tokens": 20,
            "rows in the sample": 100,
            "shown as demonstrations": 50,
        },
        "tokens": [],
        "noise": [{"corruption": "words shuffled", "rows": 40, "chance": "0.5 ± 0.13"} | of_scorers],
        "values": dict.fromkeys(of_scorers, []),
        "sensitivity": [{"ICA with": "one half of the holdout against the other", "rank correlation": 0.8}],
        "scores": [{"scorer": "ica + likelihood", "seconds, alone": 12.0}],
    }


def test_verdicts_follow_the_numbers_and_no_further_than_chance():
    """Another score is recommended only where it is better by more than chance, and never one that does not look at the holdout."""
    numbers = an_audit(ica=0.6, likelihood=1.0, **{"ica + likelihood": 0.7, "rds": 0.82})
    keep, enough, cost = verdicts(numbers)
    assert keep.title == "Keep `score: ica + likelihood`." and yaml.safe_load(keep.block) == {"ica": {"holdout": "good.jsonl"}}
    assert enough.title == "The holdout (50 rows) is large enough." and "0.80 (chance: 0 ± 0.20)" in enough.evidence
    assert cost.title == "Scoring all 1000 rows once takes about 2 minutes on this machine."
    numbers["noise"][0]["rds"] = 0.84
    other = verdicts(numbers)[0]
    assert other.title == "`score: rds` suits this data better than the config's own."
    assert yaml.safe_load(other.block) == {"ica": {"holdout": "good.jsonl", "score": "rds"}}
    numbers["noise"][0] |= dict.fromkeys(("ica", "ica + likelihood", "rds"), 0.6)
    assert "better than chance would" in verdicts(numbers)[0].title
    numbers["sensitivity"][0]["rank correlation"] = 0.4
    assert "too small" in verdicts(numbers)[1].title
    numbers |= {"noise": [], "sensitivity": []}
    assert "No noise could be planted" in verdicts(numbers)[0].evidence and "at least 8 rows" in verdicts(numbers)[1].evidence


def test_a_row_with_images_keeps_its_prompt():
    """Its later turns may show an image, whose tokens need their pixels."""
    tokens, scored = np.arange(3, 9), np.array([0, 0, 0, 1, 1, 1], bool)
    shown = Example((Sequence(tokens, scored, ((0, object()),)),), "sft")
    assert _without_prompt(shown) is shown
    assert _without_prompt(Example((Sequence(tokens, scored),), "sft")).sequences[0].tokens.tolist() == [6, 7, 8]


def test_agreement_and_auroc():
    a = np.arange(20.0)
    assert agreement(a, a) == {"rank correlation": 1.0, "best tenth shared": 1.0, "worst tenth shared": 1.0}
    assert agreement(a, -a)["best tenth shared"] == 0.0 and agreement(a, np.ones(20))["rank correlation"] is None
    assert auroc(np.array([3.0, 2, 1, 0]), 2) == 1.0 and auroc(np.array([1.0, 1, 1, 1]), 2) == 0.5
    assert auroc(np.array([2.0, 0, 1, np.nan]), 2) == 0.5


def test_corruptions_change_the_last_answer_alone():
    tokenizer = tiny.make_tokenizer()
    rows = []
    for i in range(8):
        prompt = tokenizer(f"seven apples {i}")["input_ids"]
        answer = tokenizer(f"the sum of {i} and {i + 1} pears counts {3 * i + 10}<|im_end|>")["input_ids"]
        scored = np.array([False] * len(prompt) + [True] * len(answer) + [False])
        rows.append(Example((Sequence(np.array([*prompt, *answer, 5]), scored),), "sft"))
    found = corrupted(rows, tokenizer, np.random.default_rng(0))
    for kind, copies in found.items():
        for row, copy in zip(rows, copies, strict=True):
            old, new = row.sequences[0], copy.sequences[0]
            assert not np.array_equal(old.tokens, new.tokens), kind
            np.testing.assert_array_equal(old.tokens[~old.scored], new.tokens[~new.scored])
            assert (old.tokens[-2:] == new.tokens[-2:]).all() and new.scored[-2] and not new.scored[-1]
    text = tokenizer.decode(found["altered numbers"][0].sequences[0].tokens)
    assert "the sum of" in text and "the sum of 0 and 1" not in text
    shuffled = found["words shuffled"][3].sequences[0]
    assert sorted(shuffled.tokens) == sorted(rows[3].sequences[0].tokens)
    pair = Example((rows[0].sequences[0], rows[1].sequences[0]), "pair")
    assert corrupted([pair], tokenizer, np.random.default_rng(0))["flipped"][0].sequences == pair.sequences[::-1]
