"""`ica-plugin score`: any scorers, no training, with the host's own config."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ..run.files import ScoreFile


def write_scores(host: ModuleType, config: Path, out: Path, score: str | None) -> int:
    """Score every train row with the model as the config loads it; every process of a launcher calls it.

    Finished blocks lie beside `out` until all are there, so that the same command goes on where it was killed.

    Args:
        host: the host's module, with `attached`.
        config: the host's config.
        out: where the scores go: the columns of a run's scores.parquet, one line per train row, and one more column per
            scorer where there are several. `source` is the row's place in the data file, where the host moved it.
        score: scorers instead of the config's.

    Returns:
        number of rows scored; 0 in all processes but the first.

    Raises:
        ICAError: what is wrong with the config, or a scorer that is not defined for it.
    """
    callback, source = host.attached(config, {} if score is None else {"score": score})
    trainer = callback.trainer
    trainer.callback_handler.callbacks = []  # no tracker starts a run for this
    files = callback.files
    callback.refresh.files = ScoreFile(out, *(source or ()), moved_rows=files.moved_rows, train_rows=files.train_rows)
    parts = callback.refresh.parts = callback.parts_in(out.with_name(f"{out.name}.unfinished"))
    callback.refresh(list(range(len(callback.train))), shared=True)
    trainer.accelerator.wait_for_everyone()
    parts.remove()
    return len(callback.train) if trainer.accelerator.is_main_process else 0
