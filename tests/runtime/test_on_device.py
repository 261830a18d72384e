"""What a GPU packs itself must be what the model computes: asked of the module, not of the names of its parts."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from families import build

from sedac_cli.gates.base import Gate
from sedac_cli.gates.cascade import CascadeGate, FixedGate
from sedac_cli.gates.learned import LearnedGate, Router
from sedac_cli.gates.simple import AlwaysGate, NeverGate, RandomGate
from sedac_cli.gates.soft import SoftGate
from sedac_cli.gates.stability import StabilityGate
from sedac_cli.gpu.packed import is_plain
from sedac_cli.probes import LREProbe
from sedac_cli.report.tokens import Recorder
from sedac_cli.runtime.graph.standard import NotStandardError, activation_of
from sedac_cli.runtime.on_device import PACK_FROM, OnDevice, may_pack
from sedac_cli.runtime.skip import skipping
from sedac_cli.standins import ZeroStandIn
from sedac_cli.structure import find_decoder


def mlp_of(family, **config):
    return find_decoder(build.__wrapped__(family, **config)).branches[0].entry.bfloat16()


@pytest.mark.parametrize(
    ("family", "plain"),
    [("llama", True), ("qwen3", True), ("gemma", True), ("doge", False), ("bitnet", False), ("falcon_h1", False)],
)
def test_parts_of_these_names_may_be_more_than_an_mlp(family, plain):
    """Experts, a norm, multipliers."""
    own = {"doge": {"is_moe": True}, "bitnet": {"hidden_act": "silu"}, "falcon_h1": {"mlp_multipliers": [0.5, 2.0]}}
    mlp = mlp_of(family, **own.get(family, {}))
    assert is_plain(mlp, activation_of(mlp)) is plain
    assert is_plain(mlp, activation_of(mlp)) is plain  # as it was measured


def test_what_is_done_beside_the_parts_is_seen():
    class Scaled(torch.nn.Module):
        def __init__(self, inner, least):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj
            self.least = least

        def forward(self, x):
            gate = torch.nn.functional.silu(self.gate_proj(x))
            return self.down_proj((gate * self.up_proj(x)).clamp(-self.least, self.least))

    inner = mlp_of("llama")
    assert is_plain(Scaled(inner, 1e9), "silu")
    assert not is_plain(Scaled(inner, 5.0), "silu")  # seen on large rows alone
    assert not is_plain(inner, "gelu")


def test_who_listens_to_the_parts_is_not_passed_over():
    mlp = mlp_of("llama")
    assert is_plain(mlp, "silu")
    handle = mlp.down_proj.register_forward_hook(lambda *a: None)
    assert not is_plain(mlp, "silu")
    handle.remove()
    assert is_plain(mlp, "silu")


def test_an_activation_with_weights_elsewhere_is_not_standard():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1, device="meta"))

        def forward(self, x):
            return x * self.scale + torch.zeros(1)

    with pytest.raises(NotStandardError, match="more than a function"):
        activation_of(type("Mlp", (), {"act_fn": Own()})())


def test_who_may_blend():
    probe = LREProbe(8, 2).requires_grad_(False)
    deciding = [
        NeverGate(4), AlwaysGate(4, 1), RandomGate(4, 0.5), StabilityGate(4, min_layer=1), LearnedGate(4, {1: Router(8)}, 0.0),
        CascadeGate(4, {1: probe}, {1: 0.5}), FixedGate(4, {1: probe}, {1: 0.5}),
    ]  # fmt: skip
    assert not any(gate.blends or Recorder(gate).blends for gate in deciding)

    class Mine(AlwaysGate):
        pass

    class Deciding(AlwaysGate):
        decides = True

    soft = SoftGate(4, {1: probe}, {1: 0.5})
    assert all(gate.blends for gate in (soft, Recorder(soft), Gate(4), Mine(4, 1)))
    assert not Deciding(4, 1).blends
    branch = find_decoder(tiny_model()).branches[0]
    assert OnDevice.of(branch, Recorder(soft), ZeroStandIn()) is None


class Cuda:
    is_cuda, dtype, shape = True, torch.bfloat16, (PACK_FROM, 8)


def test_rows_that_somebody_wants_gradients_of_are_the_hosts():
    with torch.no_grad():
        assert may_pack(Cuda())
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.cuda.is_available() is False or not may_pack(Cuda())
        single = Cuda()
        single.dtype = torch.float32
        assert not may_pack(single)
    assert not may_pack(Cuda())


def test_a_paused_pass_after_a_broken_one_is_the_models_own():
    model = tiny_model()
    ids = torch.arange(6).unsqueeze(0)
    expected = model(ids).logits

    def broken(*args):
        raise RuntimeError("no")

    with skipping(model, "always:1") as run:
        handle = model.model.layers[3].register_forward_hook(broken)
        with pytest.raises(RuntimeError):
            model(ids)
        handle.remove()
        run.paused = True
        assert torch.equal(model(ids).logits, expected)
