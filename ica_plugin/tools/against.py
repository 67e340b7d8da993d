"""A run's evaluation loss against that of the same run without the block, from what the host logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ICAError


def compared(with_block: Path, without: Path) -> dict[str, Any]:
    """The last evaluation of both runs at the same step.

    Args:
        with_block, without: their output folders.

    Returns:
        `step`, `loss` and `loss without`.

    Raises:
        ICAError: a run that evaluated nothing, or no step at which both did.
    """
    ours, theirs = _losses(with_block), _losses(without)
    shared = ours.keys() & theirs.keys()
    if not shared:
        raise ICAError(
            f"--against: no step at which both runs were evaluated ({with_block}: {sorted(ours)}; {without}: {sorted(theirs)}). Compare runs "
            "of equal steps and evaluation."
        )
    step = max(shared)
    return {"step": step, "loss": ours[step], "loss without": theirs[step]}


def _losses(output_dir: Path) -> dict[int, float]:
    """Evaluation loss by step, of the newest state that the trainer saved."""
    states = [path for path in (output_dir, *output_dir.glob("checkpoint-*")) if (path / "trainer_state.json").is_file()]
    found = [json.loads((path / "trainer_state.json").read_text()) for path in states]
    if not found:
        raise ICAError(
            f"--against: {output_dir} has no trainer_state.json, neither itself nor in a checkpoint; give the output_dir of a run."
        )
    newest = max(found, key=lambda state: state["global_step"])
    losses = {line["step"]: line["eval_loss"] for line in newest["log_history"] if "eval_loss" in line}
    if not losses:
        raise ICAError(
            f"--against: {output_dir} was never evaluated, so there is no loss to compare. Give both runs the same test rows."
        )
    return losses
