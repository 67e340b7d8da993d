"""What `ica-plugin validate` says of a config: the same for every host."""

from __future__ import annotations

from typing import Any

from ..config import ICAConfig
from .holdout import check_holdout, joined
from .loaders import HoldoutLoader
from .public import public_block
from .read import one_row, read_examples
from .store import Kind
from .weights_file import read_weights


def summary(
    config: ICAConfig,
    train: Any,
    load: HoldoutLoader,
    *,
    kind: Kind | None = None,
    context: int | None = None,
    moved_rows: str = "",
) -> dict[str, Any]:
    """Check the block, the train rows and the holdout without a model.

    Args:
        config: the block.
        train: the host's train rows, `datasets.Dataset`.
        load: the host's loader.
        kind: of the train rows, where the host tokenises them in the trainer, so that they cannot be read here and are counted alone;
            None where it tokenises them before.
        context: the model's context in tokens, None if unlimited.
        moved_rows: why the train rows do not stand as in the data file, if so.

    Returns:
        what was found, by name.

    Raises:
        ICAError: what is wrong.
    """
    found: dict[str, Any] = {"rows": len(train)}
    if config.weights is not None:
        column = config.weights in train.column_names
        weights = train[config.weights] if column else read_weights(config.weights, len(train), moved_rows=moved_rows)
        return {**found, "weights": f"{config.weights}, mean {sum(weights) / len(weights):.3g}"}
    rows_of_run = None
    if kind is None:
        rows_of_run = read_examples(train, one_row)
        kind = rows_of_run.kind
    config.check_kind(kind)
    sets = {name: load.dataset(one) for name, one in config.sets.items()}
    found["holdout rows"] = ", ".join(f"{len(rows)} ({source})" for source, rows in sets.values())
    if rows_of_run is not None:
        checked = {
            name: check_holdout(source, load.examples(source, rows, one_row), rows_of_run, context)
            for name, (source, rows) in sets.items()
        }
        holdout = joined(checked)
        found["usable as demonstrations"] = len(holdout.shown)
        found["train rows that are also in the holdout"] = holdout.rows_in_train
    return {**found, "block": {key: value for key, value in public_block(config).items() if value is not None}}
