"""Test bodies of rows with images that every host must pass, and the plain reference they compare with."""

from __future__ import annotations

import numpy as np
import torch

from checks import callback_of
from ica_plugin.data.scores import read_scores

GRIDS = ("image_grid_thw", "video_grid_thw")
PIXELS = ("pixel_values", "pixel_values_videos", *GRIDS)


@torch.no_grad()
def logprob(trainer, lines: list[dict]) -> float:
    """Sum of the log-probs of the last line's supervised tokens after those of the others; each is a collated batch of one row."""
    model = trainer.model
    ids = torch.cat([line["input_ids"][line["attention_mask"] != 0] for line in lines])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in PIXELS:
        shown = [line[key] for line in lines if line.get(key) is not None]
        if shown:
            inputs[key] = torch.cat(shown)
    if not inputs.keys().isdisjoint(GRIDS):
        kinds = (model.config.image_token_id, 1), (model.config.video_token_id, 2)
        inputs["mm_token_type_ids"] = sum((ids == token).long() * kind for token, kind in kinds)
    model.eval()
    logprobs = model(**inputs, use_cache=False).logits[0].double().log_softmax(-1)
    labels = lines[-1]["labels"][lines[-1]["attention_mask"] != 0]
    first = ids.shape[1] - len(labels)
    at = [first + i for i in range(len(labels)) if labels[i] != -100 and i > 0]
    return float(sum(logprobs[t - 1, ids[0, t]] for t in at))


def check_image_scores(trainer, collate, *, sides: int = 1, normalize: bool = False) -> None:
    """Scores of a trained policy are those of one row at a time, and those of other images are not.

    Args:
        trainer: attached, before `train()`; its holdout are the first rows of its train data.
        collate: trainer, row → its sequences (chosen, rejected of a pair), each a batch of the host's collator of one line.
        sides: sequences of a row.
        normalize: scores are per token.
    """
    trainer.train()
    callback = callback_of(trainer)
    train, held = list(range(len(callback.train))), len(callback.holdout.examples)
    callback.refresh(train, shared=True)
    table = read_scores(callback.files.folder / "scores.parquet").to_pylist()
    last = {line["row"]: line for line in table if line["refresh"] == callback.state.counts.refreshes - 1}
    assert sorted(last) == train
    lines = [collate(trainer, row) for row in train]

    def gain(row: int, demonstrations: list[int], images: int) -> float:
        """The score with the images of the row `images`."""
        gains = []
        for side in range(sides):
            shown = {**lines[row][side], **{key: lines[images][side][key] for key in PIXELS if key in lines[images][side]}}
            tokens = int((shown["labels"][shown["attention_mask"] != 0][1:] != -100).sum()) if normalize else 1
            context = [lines[d][0] for d in demonstrations]
            gains.append((logprob(trainer, [*context, shown]) - logprob(trainer, [shown])) / tokens)
        return gains[0] if sides == 1 else gains[0] - gains[1]

    differences = []
    for row, line in last.items():
        assert row not in line["demos"], "a row is shown to itself"
        assert len(line["demos"]) == callback.config.k and max(line["demos"]) < held
        differences.append(abs(line["score"] - gain(row, line["demos"], row)))
    assert max(differences) < 1e-3, differences
    shapes = [[(key, lines[row][0][key].shape) for key in PIXELS if key in lines[row][0]] for row in train]
    alike = {row: next(o for o in train if o != row and shapes[o] == shapes[row]) for row in train}
    other = [abs(line["score"] - gain(row, line["demos"], alike[row])) for row, line in last.items()]
    assert max(other) > 1e-2, other
    assert np.std([line["score"] for line in last.values()]) > 0.05
