"""What a decode step does between its matrices, against its twins in float32: norms, a router in one with them, attention."""

from __future__ import annotations

import pytest
import torch
from cases import (
    HALVES,
    agree_away_from,
    assert_close,
    close,
    counters_come_back,  # noqa: F401 - a fixture
    poison,
    random,
    router_of,
)

from sedac_cli.gpu import decode, decode_reference, reference
from sedac_cli.gpu.decode import Heads
from sedac_cli.gpu.probe import RouterWeights
from sedac_cli.gpu.skinny import PENDING, skinny_gated, skinny_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("counters_come_back"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels cannot run here"),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (3, 77), (64, 3584), (2, 8192)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_norm(dtype, rows, width, plus_one):
    x, weight = random(rows, width, dtype=dtype, scale=3), random(width, dtype=dtype)
    expected = decode_reference.rms_norm(x, weight, 1e-6, plus_one)
    close("norm", decode.rms_norm(x, weight, 1e-6, plus_one), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (3, 77), (64, 3584), (2, 8192), (5, 12304)])
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("gap", [0, 5])
def test_a_sum_is_normed_as_if_it_had_been_written_first(dtype, rows, width, plus_one, gap):
    """To the bit: a graph of few rows and a step of many then hand on the same stream. `gap`: rows that lie apart, unaligned."""
    x, residual = (random(rows, width + gap, dtype=dtype, scale=3)[:, gap:] for _ in range(2))
    weight, kept = random(width, dtype=dtype), (x.clone(), residual.clone())
    y, total = decode.add_rms_norm(x, residual, weight, 1e-6, plus_one)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, decode.rms_norm(x + residual, weight, 1e-6, plus_one))
    expected, _ = decode_reference.add_rms_norm(x, residual, weight, 1e-6, plus_one)
    close("norm", y, expected.float())
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "heads",
    [
        Heads(28, 4, 128, 128, 128**-0.5), Heads(6, 2, 64, 32, 0.125), Heads(16, 1, 256, 256, 0.06),
        Heads(4, 4, 80, 80, 0.1, softcap=5.0), Heads(8, 2, 128, 128, 0.09, window=100), Heads(3, 3, 16, 16, 0.25),
    ],
)  # fmt: skip
@pytest.mark.parametrize("slot", [0, 5, 31, 32, 127, 128, 700])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", [4, 30])
def test_attend(dtype, heads, slot, normed, rows):
    """30 rows: some heads' blocks then have a multiprocessor each, and more warps."""
    places = 720
    qkv = random(rows, heads.width, dtype=dtype)
    angle = torch.rand(rows, heads.rotary, device="cuda") * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    norms = tuple(1 + random(heads.size, dtype=dtype, scale=0.1) for _ in range(2)) if normed else None
    keys, values = (random(rows, heads.key, places, heads.size, dtype=dtype) for _ in range(2))
    twins, before = (keys.clone(), values.clone()), qkv.clone()
    at = torch.tensor([slot], device="cuda")
    first = torch.tensor([0, slot // 3, slot, slot // 2] * 8, device="cuda")[:rows]
    scratch = decode.attend_scratch(rows, heads, qkv.device)
    scratch.fill_(float("nan"))
    found = decode.attend(qkv, heads, cos, sin, keys, values, at, first, scratch, norms, 1e-6)
    expected = decode_reference.attend(qkv, heads, cos, sin, *twins, at, first, None, norms, 1e-6)
    close("keys", keys, twins[0].float())
    assert torch.equal(values, twins[1])
    assert torch.equal(qkv, before)
    close(f"slot {slot}", found, expected.float())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize(("width", "size"), [(104, 17), (3584, 4608), (3584, 40), (8192, 300), (384, 9000)])
def test_a_norm_within_a_launch_is_the_norm_to_the_bit(dtype, rows, plus_one, width, size):
    """Then what is normed in a launch of its own (a router needs it) and what is not are one model."""
    x, weight = random(rows, width, dtype=dtype, scale=3), random(width, dtype=dtype)
    matrix, up = (random(size, width, dtype=dtype, scale=width**-0.5) for _ in range(2))
    norm = (weight, 1e-6, plus_one)
    y = decode.rms_norm(x, *norm)
    assert torch.equal(skinny_linear(x, [matrix], norm=norm), skinny_linear(y, [matrix]))
    assert torch.equal(skinny_gated(x, matrix, up, "silu", norm=norm), skinny_gated(y, matrix, up, "silu"))
    router = RouterWeights.pack(router_of(width, 16, "cuda"), "cuda")
    scratch = decode.norm_route_scratch(rows, width, x.device)
    routed, _, _ = decode.norm_route(x, weight, 1e-6, router, scratch, threshold=0.0, plus_one=plus_one)
    assert torch.equal(routed, y)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 3584), (5, 77), (16, 3584), (17, 3584), (33, 3584), (38, 77), (64, 384), (63, 5120), (3, 4096)],
)
@pytest.mark.parametrize("units", [0, 16, 64])
def test_norm_and_router_in_one(dtype, rows, width, units):
    router = router_of(width, units, "cuda")
    x, weight = random(rows, width, dtype=dtype, scale=3), random(width, dtype=dtype)
    may, real = (torch.rand(rows, device="cuda") < share for share in (0.8, 0.7))
    needs = torch.full((1,), 9, dtype=torch.int32, device="cuda")
    scratch = decode.norm_route_scratch(rows, width, x.device)
    poison(scratch)
    y, score, run = decode.norm_route(
        x,
        weight,
        1e-6,
        RouterWeights.pack(router, "cuda"),
        scratch,
        threshold=0.1,
        may_skip=may,
        real=real,
        needs=needs,
    )
    close("norm", y, decode_reference.rms_norm(x, weight, 1e-6).float())
    assert torch.equal(y, decode.rms_norm(x, weight, 1e-6))
    exact, wanted = reference.router_score(y, router, threshold=0.1, may_skip=may)
    assert_close("score", score, exact, 1e-3)
    agree_away_from("run", run, wanted, exact, 0.1, 1e-3)
    assert needs.item() == int((run & real).any())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 3584), (8, 3584), (19, 3584), (62, 3584), (5, 77), (64, 384), (4, 5120), (3, 8192), (2, 12304)],
)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("gap", [0, 5])
def test_a_sum_is_routed_as_if_it_had_been_written_first(dtype, rows, width, plus_one, gap):
    x, residual = (random(rows, width + gap, dtype=dtype, scale=3)[:, gap:] for _ in range(2))
    weight, router = random(width, dtype=dtype), RouterWeights.pack(router_of(width, 16, "cuda"), "cuda")
    scratch, kept = decode.norm_route_scratch(rows, width, x.device), (x.clone(), residual.clone())
    asked = {"threshold": 0.1, "plus_one": plus_one, "may_skip": torch.rand(rows, device="cuda") < 0.8}
    expected = decode.norm_route(x + residual, weight, 1e-6, router, scratch, **asked)
    total, needs = torch.empty_like(x), torch.full((1,), 9, dtype=torch.int32, device="cuda")
    ready = torch.full((1,), PENDING, dtype=torch.int32, device="cuda")
    decided = torch.empty(rows, device="cuda"), torch.empty(rows, dtype=torch.bool, device="cuda")
    poison(total, scratch)
    found = decode.norm_route(
        x,
        weight,
        1e-6,
        router,
        scratch,
        needs=needs,
        ready=ready,
        decided=decided,
        residual=residual,
        total=total,
        **asked,
    )
    assert torch.equal(total, x + residual)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert needs.item() == int(expected[2].any())
    assert ready.item() == PENDING + decode.norm_route_parts(rows, width)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


def test_a_sum_needs_a_place_of_its_own():
    x, residual = (random(2, 64, dtype=torch.bfloat16) for _ in range(2))
    weight, router = random(64, dtype=torch.bfloat16), RouterWeights.pack(router_of(64, 4, "cuda"), "cuda")
    scratch = decode.norm_route_scratch(2, 64, x.device)
    for total in (x, residual):
        with pytest.raises(ValueError, match="memory of its own"):
            decode.norm_route(x, weight, 1e-6, router, scratch, threshold=0.0, residual=residual, total=total)
    with pytest.raises(ValueError, match="both or neither"):
        decode.norm_route(x, weight, 1e-6, router, scratch, threshold=0.0, residual=residual)
    with pytest.raises(ValueError, match=r"residual is \(1, 64\)"):
        decode.add_rms_norm(x, residual[:1], weight, 1e-6)
