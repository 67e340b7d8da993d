"""Which train row is where in a batch, by the tokens of the collator's batch."""

import numpy as np
import pytest
import torch

from ica_plugin.data.row_ids import NO_ROW, ROW_IDS, RowIdCollator
from ica_plugin.errors import ICAError

ROWS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
FEATURES = [[{"input_ids": ROWS[0], ROW_IDS: 0}, {"input_ids": ROWS[1], ROW_IDS: 1}], [{"input_ids": ROWS[2], ROW_IDS: 2}]]


def packing(side: str, order=lambda tokens: tokens):
    """A collator of bins as Axolotl's: the rows of a bin one after the other, padded to 8 on one side."""

    def collate(bins):
        lines = [np.concatenate([order(row["input_ids"]) for row in rows]) for rows in bins]
        pads = [np.zeros(8 - len(line), int) for line in lines]
        joined = [[line, pad] if side == "right" else [pad, line] for line, pad in zip(lines, pads, strict=True)]
        return {"input_ids": torch.tensor(np.stack([np.concatenate(parts) for parts in joined]))}

    return collate


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_rows_are_found_with_padding_on_either_side(side):
    batch = RowIdCollator(packing(side))(FEATURES)
    expected = [[0, 0, 0, 1, 1], [2, 2, 2, 2]]
    for line, ids in zip(batch[ROW_IDS].tolist(), expected, strict=True):
        padding = [NO_ROW] * (8 - len(ids))
        assert line == (ids + padding if side == "right" else padding + ids)


def test_rows_that_a_collator_moved_are_refused():
    with pytest.raises(ICAError, match="does not hold its rows one after the other"):
        RowIdCollator(packing("right", order=lambda tokens: tokens[::-1]))(FEATURES)
