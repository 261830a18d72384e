"""The cache has one name in a transformers and another in the next; what is ours understands both."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from torch import nn

from sedac_cli.engine import SedacEngine
from sedac_cli.gates.simple import AlwaysGate
from sedac_cli.runtime.past import handing, kept, name_in, past_in, renamed
from sedac_cli.structure import find_decoder


class New(nn.Module):
    def forward(self, input_ids, cache=None, **kwargs):
        return SimpleNamespace(logits=input_ids, cache=cache)


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None, **kwargs):
        return SimpleNamespace(logits=input_ids, past_key_values=past_key_values)


class Hidden(nn.Module):
    def forward(self, *args, **kwargs):
        return SimpleNamespace(logits=None, **kwargs)


@pytest.mark.parametrize(
    ("model", "name"), [(New(), "cache"), (Old(), "past_key_values"), (Hidden(), "past_key_values")]
)
def test_a_cache_goes_in_and_comes_out_by_the_models_own_name(model, name):
    mine = object()
    assert handing(model, mine) == {name: mine}
    assert kept(model(torch.zeros(1), **handing(model, mine))) is mine
    for given in ("cache", "past_key_values"):
        assert renamed(model, {given: mine, "position_ids": 3}) == {name: mine, "position_ids": 3}
    assert renamed(model, {"cache": None, "position_ids": 3}) == {"position_ids": 3}


def test_what_a_call_was_given():
    assert past_in({"input_ids": 1}) is past_in({"cache": None}) is None
    for name in ("cache", "past_key_values", "past_key_value"):
        assert past_in({"input_ids": 1, name: "here"}) == "here"
    assert kept(SimpleNamespace(logits=1)) is None
    assert name_in(inspect.signature(lambda hidden, position_ids=None: None)) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_the_engine_goes_on_from_a_cache_by_either_name(name):
    """As a step in which tokens stand behind those that were there, not as a text that begins."""
    model = tiny_model()
    ids = torch.arange(3, 15).view(1, 12)
    engine = SedacEngine(find_decoder(model), AlwaysGate(4, 2))
    whole = engine(ids)
    first = engine(ids[:, :7], use_cache=True)
    rest = engine(ids[:, 7:], use_cache=True, **{name: first.past_key_values})
    assert rest.past_key_values.get_seq_length() == 12
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([first.skipped, rest.skipped], 1), whole.skipped)
