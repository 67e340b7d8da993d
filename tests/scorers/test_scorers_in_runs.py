"""Scorers through a trainer."""

from __future__ import annotations

import numpy as np

from ica_plugin.scorers.combine import balanced


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
    assert pq.read_table(tmp_path / "ica" / "ica" / "scores.parquet").column_names[-1] == "draws"


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
