"""Inputs go to the first device of a model that is spread over several, and what comes back from the last one is met there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from engines import CPU, one_at_a_time, rows
from ica_plugin.policy.engine import Engine
from ica_plugin.policy.packed import PackedPath
from ica_plugin.policy.padded import PaddedPath
from tiny import make_model

FIRST = torch.device("meta")  # stands for the first GPU, and the CPU for the last one


class Spread(nn.Module):
    """A model whose inputs must be on `meta` and whose hidden states are on the CPU, as after a `device_map`.

    What the inputs hold is lost on `meta`, so it is noted as the engine sends it there.
    """

    def __init__(self, model, sent: dict[str, torch.Tensor]):
        super().__init__()
        self.model, self.config, self._sent = model, model.config, sent

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, use_cache=False):
        assert input_ids.device == FIRST
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs = {name: self._sent[id(value)] for name, value in given.items() if value is not None}
        hidden = self.model.model(**inputs).last_hidden_state
        return type("Output", (), {"logits": self.model.lm_head(hidden[:, logits_to_keep]), "last_hidden_state": hidden})


@pytest.fixture
def spread(monkeypatch):
    sent: dict[int, torch.Tensor] = {}
    kept, host = [], torch.Tensor.to

    def to(tensor, *args, **kwargs):
        moved = host(tensor, *args, **kwargs)
        if moved.device == FIRST and tensor.device == CPU:
            sent[id(moved)] = tensor
            kept.append(moved)  # or another tensor may get its id
        return moved

    host_index = torch.Tensor.__getitem__

    def index(tensor, at):
        found = host_index(tensor, at)
        if tensor.device == FIRST and id(tensor) in sent:
            sent[id(found)] = host_index(sent[id(tensor)], at)
            kept.append(found)
        return found

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "__getitem__", index)
    model = make_model().eval()
    return model, Spread(model, sent)


@torch.no_grad()
@pytest.mark.parametrize("path", ["padded", "segments"])
def test_indices_meet_hidden_states_where_they_are(path, spread):
    model, wrapped = spread
    sequences = rows(5)
    taken = PaddedPath(wrapped, wrapped, FIRST) if path == "padded" else PackedPath(wrapped, wrapped, FIRST, "segments")
    taken._decoder = wrapped
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].tokens.tolist())
    found = taken.token_logprobs([sequences[i] for i in order])
    expected = one_at_a_time(model, [sequences[i] for i in order])
    np.testing.assert_allclose([values.astype(float).sum() for values in found], expected, atol=2e-4)
    prompts = sorted((s.unscored for s in sequences[:4]), key=lambda s: s.tokens.tolist())
    alone = Engine(model, device=CPU).padded.embeddings(prompts)
    np.testing.assert_allclose(taken.embeddings(prompts), alone, atol=1e-4)


def test_gradients_meet_logits_where_they_are(spread):
    model, wrapped = spread
    row = rows(1)[0]
    value = PaddedPath(wrapped, wrapped, FIRST).label_logprobs([row])[0].sum()
    assert value.device == CPU and value.item() == pytest.approx(one_at_a_time(model, [row])[0], abs=1e-4)
    assert torch.autograd.grad(value, [model.lm_head.weight])[0].abs().sum() > 0
