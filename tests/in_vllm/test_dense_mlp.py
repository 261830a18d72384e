"""Which MLPs our own kernels may run: none that computes more than its two matrices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from mlps import LAYERS, make_layers
from torch import nn

from sedac_cli.errors import InputError
from sedac_cli.gates.soft import SoftGate
from sedac_cli.vllm.dense_mlp import DenseMlp
from sedac_cli.vllm.device import DeviceSession
from sedac_cli.vllm.forced import ForcedGate


class BaseLayerWithLoRA(nn.Module):
    """As in vLLM from 0.32 on: what it does not have it takes from the layer it wraps."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


@pytest.mark.parametrize("wrapped", [(), ("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")])
def test_one_with_adapters_stays_vllms(wrapped):
    layer = make_layers()[0]
    weight = layer.mlp.down_proj.weight
    for name in wrapped:
        setattr(layer.mlp, name, BaseLayerWithLoRA(getattr(layer.mlp, name)))
    assert layer.mlp.down_proj.weight is weight  # it looks as open as before
    assert layer.mlp.down_proj.quant_method is not None
    assert (DenseMlp.of(layer.mlp) is None) == bool(wrapped)


def answers(none=None, unmeasured=None, other=None):
    """A session that gives these reasons against kernels."""
    return SimpleNamespace(
        gated=[0], no_kernels=lambda: none, not_measured=lambda: unmeasured, other_results=lambda: other
    )  # fmt: skip


def test_kernels_say_what_is_in_the_way():
    session = SimpleNamespace(
        gate=ForcedGate(LAYERS, []), dense={0: None}, adapted={0}, layers={0: make_layers()[0]}
    )  # fmt: skip
    assert DeviceSession.no_kernels(session).endswith("the Mlp of layer 0 has adapters")
    session.adapted = set()
    assert DeviceSession.no_kernels(session).endswith("the Mlp of layer 0 is not one")
    session.gate = SoftGate.__new__(SoftGate)
    assert "soft" in DeviceSession.no_kernels(session)
    with pytest.raises(InputError, match="SEDAC_MLP=kernels: this stands in the way"):
        DeviceSession.wants_kernels(answers("this stands in the way"), "kernels")


@pytest.mark.parametrize("reason", ["none", "unmeasured", "other"])
def test_unasked_kernels_run_where_nothing_speaks_against_them(reason, caplog):
    caplog.set_level("INFO", logger="vllm.sedac")
    assert DeviceSession.wants_kernels(answers(), "auto")
    assert not caplog.records
    assert not DeviceSession.wants_kernels(answers(**{reason: "for this reason"}), "auto")
    assert "conditional nodes: for this reason" in caplog.text
    assert DeviceSession.wants_kernels(answers(**{reason: "whatever"} if reason != "none" else {}), "kernels")
    assert not DeviceSession.wants_kernels(answers(), "nodes")
