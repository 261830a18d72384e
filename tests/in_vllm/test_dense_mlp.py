"""Which MLPs our own kernels may run: none that computes more than its two matrices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from mlps import LAYERS, make_layers
from torch import nn

from sedac_cli.errors import InputError
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


def test_kernels_say_that_adapters_are_in_the_way():
    session = SimpleNamespace(
        gate=ForcedGate(LAYERS, []), dense={0: None}, adapted={0}, layers={0: make_layers()[0]}
    )  # fmt: skip
    with pytest.raises(InputError, match="layer 0 has a Mlp that has adapters"):
        DeviceSession.check_kernels(session)
    session.adapted = set()
    with pytest.raises(InputError, match="layer 0 has a Mlp that is not"):
        DeviceSession.check_kernels(session)
