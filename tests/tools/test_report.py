"""`ica-plugin report` of a finished run."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ica_plugin.errors import ICAError
from ica_plugin.run.callback import ICACallback
from ica_plugin.tools.against import compared
from ica_plugin.tools.cli import app
from ica_plugin.tools.report import report_numbers, write_report
from ica_plugin.tools.row_text import RowText, text_of_run
from runs import build, run, tokenised


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, {"refresh_interval": "epoch"}, num_train_epochs=3)
    return folder


def test_page_and_numbers(finished):
    result = CliRunner().invoke(app, ["report", str(finished)])
    assert result.exit_code == 0, result.output
    page = (finished / "ica" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "Who gained" in page and "How often rows" not in page
    numbers = json.loads((finished / "ica" / "report.json").read_text())
    table = pq.read_table(finished / "ica" / "scores.parquet").to_pandas()
    assert [r["step"] for r in numbers["refreshes"]] == table.groupby("refresh").step.first().tolist()
    for refresh, group in table.groupby("refresh"):
        weight = group.weight.to_numpy(float)
        found = numbers["refreshes"][refresh]
        assert found["effective sample size"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum() / 22)
        assert found["weight q95"] == pytest.approx(np.quantile(weight, 0.95))
    wide = table.pivot(index="row", columns="refresh", values="weight")
    change = (wide[2] - wide[0]).sort_values()
    assert numbers["gained"][0]["row"] == change.index[-1] and numbers["lost"][0]["row"] == change.index[0]
    assert numbers["lost"][0]["change"] == pytest.approx(change.iloc[0], abs=1e-6)
    assert numbers["rows"][0]["row"] == wide[2].idxmax() and numbers["rows"][-1]["row"] == wide[2].idxmin()


def test_a_run_scored_once_has_nobody_who_gained_and_no_plot_over_time(finished, tmp_path):
    table = pq.read_table(finished / "ica" / "scores.parquet")
    once = table.filter(pc.equal(table["refresh"], 0))
    record = json.loads((finished / "ica" / "run.json").read_text())
    numbers = report_numbers(once.to_pydict(), record)
    assert numbers["gained"] == numbers["lost"] == [] and len(numbers["refreshes"]) == 1
    (tmp_path / "ica").mkdir()
    pq.write_table(once, tmp_path / "ica" / "scores.parquet")
    shutil.copy(finished / "ica" / "run.json", tmp_path / "ica")
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 2 and "over time" not in page
    assert "first weight" not in page and "first weight" in write_report(finished).read_text()


def test_how_often_rows_were_trained(tmp_path):
    run(tmp_path, {"refresh_interval": "epoch", "apply": "sample"}, num_train_epochs=3)
    page = write_report(tmp_path)
    numbers = json.loads(page.with_suffix(".json").read_text())
    table = pq.read_table(tmp_path / "ica" / "scores.parquet").to_pandas()
    times = table.groupby("row").draws.sum()
    counts = {line["trained"]: line["rows"] for line in numbers["trained"]}
    assert counts == {
        "never": (times == 0).sum(),
        "once": (times == 1).sum(),
        "twice": (times == 2).sum(),
        "more often": (times > 2).sum(),
    }
    assert times.sum() == 3 * 22 and sum(counts.values()) == 22
    assert "How often rows were trained" in page.read_text()
    assert all(line["times trained"] == times[line["row"]] for line in numbers["rows"])
    said = f"Of 22 rows: {counts['never']} never trained, {counts['once']} once, {counts['twice'] + counts['more often']} more often."
    assert said in page.read_text()


def test_text_stands_beside_the_very_rows_and_never_beside_others(finished, tmp_path):
    def host_of(rows):
        trainer = build(tmp_path, {"refresh_interval": "epoch"}, train=tokenised(22, rows))
        callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, ICACallback))
        return SimpleNamespace(attached=lambda config, changes: (callback, None)), callback

    host, callback = host_of(0)
    run_record = json.loads((finished / "ica" / "run.json").read_text())
    text = text_of_run(host, tmp_path / "config.yml", run_record)
    decode = callback.trainer.processing_class.decode
    assert text.of_row(3)["text"] == decode(callback.train[3].sequences[0].tokens)
    assert text.of_row(3, limit=5)["text"] == decode(callback.train[3].sequences[0].tokens)[:5] + "…"
    page = write_report(finished, tmp_path / "report.html", host=host, config=tmp_path / "config.yml").read_text()
    assert "with --config" not in page and "demonstrations" in page
    with pytest.raises(ICAError, match="are not those of the run"):
        text_of_run(host_of(1)[0], tmp_path / "config.yml", run_record)


def test_dropped_tokens_are_struck_through(tmp_path):
    trainer = run(tmp_path, {"drop_tokens": 0.3}, max_steps=1)
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, ICACallback))
    host = SimpleNamespace(attached=lambda config, changes: (callback, None))
    lines = {line["row"]: line for line in pq.read_table(tmp_path / "ica" / "scores.parquet").to_pylist()}
    row = max(lines, key=lambda row: len(lines[row]["dropped_tokens"]))
    dropped, tokens = lines[row]["dropped_tokens"], callback.train[row].sequences[0].tokens
    text = RowText(callback).of_row(row, dropped)["text"]
    struck = [a for a, b in zip(text, text[1:], strict=False) if b == "\u0336"]
    decode = callback.trainer.processing_class.decode
    assert "".join(struck) == "".join(decode([token]) for place, token in enumerate(tokens) if place in dropped)
    assert len(text.replace("\u0336", "")) >= len(decode(tokens))
    page = write_report(tmp_path, tmp_path / "report.html", host=host, config=tmp_path / "config.yml").read_text()
    assert "are struck through" in page and "tokens left out" in page


def test_against_a_run_without_the_block(finished, tmp_path):
    def evaluated(name, losses):
        (tmp_path / name / "checkpoint-8").mkdir(parents=True)
        log = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
        state = json.dumps({"global_step": 8, "log_history": [{"step": 1, "loss": 3.0}, *log]})
        (tmp_path / name / "checkpoint-8" / "trainer_state.json").write_text(state)
        return tmp_path / name

    plain = evaluated("plain", {4: 2.0, 8: 1.5})
    ours = evaluated("ours", {4: 1.9, 8: 1.4, 12: 1.0})
    assert compared(ours, plain) == {"step": 8, "loss": 1.4, "loss without": 1.5}
    with pytest.raises(ICAError, match="no step at which both"):
        compared(ours, evaluated("other", {3: 1.0}))
    with pytest.raises(ICAError, match="never evaluated"):
        compared(ours, evaluated("blind", {}))
    with pytest.raises(ICAError, match="no trainer_state.json"):
        write_report(finished, tmp_path / "report.html", against=plain)
    shutil.copytree(finished, tmp_path / "whole")
    shutil.copytree(ours / "checkpoint-8", tmp_path / "whole" / "checkpoint-8")
    page = write_report(tmp_path / "whole", against=plain).read_text()
    assert "The evaluation loss is 0.1000 lower than without the block: 1.4000 against 1.5000 at step 8." in page


def test_no_run(tmp_path, finished):
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1 and "no run of ica_plugin there" in result.output
    (tmp_path / "ica").mkdir()
    shutil.copy(finished / "ica" / "run.json", tmp_path / "ica")
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1 and "given weights" in result.output
