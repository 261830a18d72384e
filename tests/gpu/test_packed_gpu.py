"""Rows split, packed and merged on a GPU: each kernel against its twin; only rows that stay meet the MLP, the others their stand-in."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, assert_close, captured, counters_come_back, poison  # noqa: F401 - one is a fixture
from conftest import save_tiny, words
from torch import Tensor

from sedac_cli.config import ModelSpec
from sedac_cli.gpu import reference
from sedac_cli.gpu.packed import PackedMlp, activate_rows
from sedac_cli.gpu.reference import Packed, Routed
from sedac_cli.gpu.route import gather_rows, route_merge, route_split, scatter_rows
from sedac_cli.models import load_model
from sedac_cli.runtime import on_device
from sedac_cli.runtime.skip import skipping
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("counters_come_back"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels cannot run here"),
]


class Mlp(torch.nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        make = {"bias": False, "device": "cuda", "dtype": torch.bfloat16}
        self.gate_proj, self.up_proj = (torch.nn.Linear(width, inner, **make) for _ in range(2))
        self.down_proj = torch.nn.Linear(inner, width, **make)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("rows", [1, 7, 600, 4096])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rank", [0, 16])
@torch.inference_mode()
def test_packed_mlp(rows, share, rank):
    mlp = Mlp(256, 512)
    packed = PackedMlp.of(mlp, "silu")
    x = torch.randn(rows, 256, device="cuda").bfloat16()
    leave = torch.rand(rows, device="cuda") < share
    standin = None
    expected = mlp(x).float()
    other = torch.zeros_like(expected)
    if rank:
        a, b, bias = (
            torch.randn(*shape, device="cuda").bfloat16() * 0.1 for shape in ((rank, 256), (256, rank), (256,))
        )
        standin = (a, b, bias)
        other = (torch.nn.functional.silu(x @ a.T) @ b.T + bias).float()
    found = packed(x, leave, standin).float()
    assert_close("rows", found, torch.where(leave.unsqueeze(1), other, expected), 0.02)


@pytest.mark.parametrize("count", [0, 3, 50])
def test_rows_behind_the_count_are_left_alone(count):
    both = torch.randn(50, 128, device="cuda").bfloat16()
    both[count:] = float("nan")
    for gate, up in (both.chunk(2, dim=1), [half.contiguous() for half in both.chunk(2, dim=1)]):
        found = activate_rows(gate, up, "gelu", torch.tensor([count], dtype=torch.int32, device="cuda"))
        expected = torch.nn.functional.gelu(gate[:count]) * up[:count]
        assert_close("rows", found[:count].float(), expected.float(), 0.02)


@pytest.mark.parametrize("gate", ["always:2", "random:0.4"])
def test_a_prompt_pass_packs_without_the_host(tmp_path, monkeypatch, gate):
    folder = save_tiny(tmp_path, hidden_size=64, max_position_embeddings=1024)
    loaded = load_model(ModelSpec(ref=str(folder), device="cuda", dtype="bfloat16"))
    standin = LowRankStandIns({layer: LowRank(64, 16).requires_grad_(False) for layer in range(4)})
    for module in standin.by_layer.values():
        for p in module.parameters():
            torch.nn.init.normal_(p, 0, 0.1)
    ids = loaded.tokenizer(words(160), return_tensors="pt")["input_ids"][:, :600].cuda()
    logits, packed, call = {}, [], PackedMlp.__call__
    monkeypatch.setattr(PackedMlp, "__call__", lambda mlp, *args: (packed.append(mlp), call(mlp, *args))[1])
    for name, limit in (("packed", 1), ("host", 10**9)):
        monkeypatch.setattr(on_device, "PACK_FROM", limit)
        with torch.inference_mode(), skipping(loaded.model, gate, standin, decoder=loaded.decoder) as run:
            logits[name] = loaded.model(input_ids=ids, use_cache=False).logits.float()
        logits[name + " ratio"] = run.skip_ratio
        assert bool(packed) == (name == "packed")
        packed.clear()
    assert logits["packed ratio"] == logits["host ratio"] > 0
    assert float((logits["packed"] - logits["host"]).norm() / logits["host"].norm()) < 0.05


# Routing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (7, 3), (33, 77), (1000, 896), (8192, 3584), (40000, 5)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_routing(dtype, rows, width, share):
    hidden = torch.randn(rows, width, device="cuda").to(dtype)
    check_routing(hidden, torch.rand(rows, device="cuda") < share)


def check_routing(hidden: Tensor, leaves: Tensor) -> None:
    rows = hidden.shape[0]
    out = Routed(
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in reference.route_split(hidden, leaves))
    )
    poison(*out)
    found, expected = route_split(hidden, leaves, out), reference.route_split(hidden, leaves)
    assert torch.equal(found.counts, expected.counts), (
        f"counts {found.counts.tolist()}, expected {expected.counts.tolist()}"
    )
    stay, gone = expected.counts.tolist()
    assert torch.equal(found.slot, expected.slot), "slot"
    assert torch.equal(found.active_indices[:stay], expected.active_indices[:stay]), "active indices"
    assert torch.equal(found.exit_indices[:gone], expected.exit_indices[:gone]), "exit indices"
    assert torch.equal(found.active[:stay], expected.active[:stay]), "active rows"
    assert torch.equal(found.exit[:gone], expected.exit[:gone]), "exit rows"
    assert (found.active[stay:] == -777).all(), "wrote past the active rows"
    assert (found.exit[gone:] == -777).all(), "wrote past the exit rows"
    merged = torch.empty_like(found.active)
    poison(merged)
    assert torch.equal(route_merge(found.active, found.exit, found.slot, merged), hidden), "merge"
    scale = torch.where(leaves, 0.0, torch.rand(rows, device="cuda") + 0.01)
    packed = Packed(found.active, found.active_indices, found.counts, found.slot)
    poison(*packed, merged)
    gather_rows(hidden, scale, packed)
    assert packed.counts.tolist() == [stay, gone], "gather counts"
    assert torch.equal(packed.rows[:stay], expected.active[:stay]), "gathered rows"
    assert torch.equal(packed.slot, expected.slot), "gather slot"
    back = scatter_rows(packed.rows, packed.slot, merged)
    assert torch.equal(back, torch.where(leaves[:, None], torch.zeros_like(hidden), hidden)), "scatter"


def test_routing_of_strided_and_unaligned_rows():
    wide = torch.randn(500, 131, device="cuda", dtype=torch.bfloat16)
    for hidden in (wide[:, 1:], wide[:, :128], wide[::3, 2:130]):
        check_routing(hidden, torch.rand(hidden.shape[0], device="cuda") < 0.5)


def test_routing_replays():
    hidden = torch.randn(777, 64, device="cuda", dtype=torch.bfloat16)
    leaves = torch.zeros(777, dtype=torch.bool, device="cuda")

    def work():
        routed = route_split(hidden, leaves)
        return routed, route_merge(routed.active, routed.exit, routed.slot)

    graph, (routed, merged) = captured(work)
    for share in (0.2, 0.9, 0.0):
        leaves.copy_(torch.rand(777) < share)
        hidden.copy_(torch.randn(777, 64))
        poison(merged, routed.counts)
        graph.replay()
        assert torch.equal(merged, hidden)
        assert routed.counts.tolist() == [int((~leaves).sum()), int(leaves.sum())]
