"""The linear kernels against their twins in float32: every shape a step may have, flags that stop a launch, in-place sums."""

from __future__ import annotations

import pytest
import torch
from cases import (
    HALVES,
    captured,
    close,
    counters_come_back,  # noqa: F401 - a fixture
    poison,
    random,
    router_of,
    wide,
)

from sedac_cli.gpu import decode, decode_reference, skinny
from sedac_cli.gpu.probe import RouterWeights
from sedac_cli.gpu.skinny import PENDING, Other, skinny_gated, skinny_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("counters_come_back"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels cannot run here"),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 33, 64])
@pytest.mark.parametrize(
    ("width", "sizes"),
    [(8, (1,)), (104, (17,)), (384, (384, 128, 128)), (3584, (3584, 512, 512)), (18944, (40,)), (72, (3, 5, 7))],
)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype, rows, width, sizes, bias):
    x = random(rows, width, dtype=dtype)
    weights = [random(n, width, dtype=dtype, scale=width**-0.5) for n in sizes]
    biases = [random(n, dtype=dtype) for n in sizes] if bias else [None] * len(sizes)
    out = torch.empty(rows, sum(sizes), dtype=dtype, device="cuda")
    poison(out)
    skinny_linear(x, weights, biases, out=out)
    expected = torch.cat([torch.nn.functional.linear(*wide(x, w, b)) for w, b in zip(weights, biases, strict=True)], -1)
    close(f"{rows} x {width} -> {sizes}", out, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 7, 20, 64])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("width", "size"), [(384, 1024), (3584, 1000), (40, 33)])
def test_gated(dtype, rows, activation, width, size):
    x = random(rows, width, dtype=dtype)
    gate, up = (random(size, width, dtype=dtype, scale=2 * width**-0.5) for _ in range(2))
    expected = decode_reference.skinny_gated(*(t.float() for t in (x, gate, up)), activation)  # type: ignore[arg-type]
    close(activation, skinny_gated(x, gate, up, activation), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("width", [8, 40, 512, 896, 992, 1000, 1536])
def test_rows_that_do_not_fit_beside_the_ring(dtype, rows, width, monkeypatch):
    """On a chip with less shared memory x is read from L2, by blocks that have several items, in as few as one step each."""
    monkeypatch.setattr(skinny, "room_for_x", lambda *_: -1)
    x, size = random(rows, width, dtype=dtype), 40000
    weight, up = (random(size, width, dtype=dtype, scale=width**-0.5) for _ in range(2))
    close("linear", skinny_linear(x, [weight]), x.float() @ weight.float().T)
    gated = decode_reference.skinny_gated(x.float(), weight.float(), up.float(), "silu")
    close("gated", skinny_gated(x, weight, up, "silu"), gated)


@pytest.mark.parametrize("rows", [1, 12, 30, 50])
@pytest.mark.parametrize("need", [0, 1])
def test_a_flag_stops_the_launch_and_nothing_is_written(rows, need):
    x, weight = random(rows, 256, dtype=torch.bfloat16), random(100, 256, dtype=torch.bfloat16, scale=0.1)
    flag = torch.full((1,), need, dtype=torch.int32, device="cuda")
    held = random(rows, 100, dtype=torch.bfloat16)
    out = held.clone()
    skinny_linear(x, [weight], residual=out, out=out, need=flag)
    z = held.clone()
    skinny_gated(x, weight, weight, "silu", out=z, need=flag)
    if not need:
        assert torch.equal(out, held)
        assert torch.equal(z, held)
    else:
        close("residual", out, held.float() + x.float() @ weight.float().T)
        assert not torch.equal(z, held)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 32, 64])
@pytest.mark.parametrize(
    ("width", "size", "rank"), [(3584, 18944, 192), (1024, 2816, 64), (136, 400, 8), (64, 40, 104), (8192, 1000, 2056)]
)
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_a_launch_does_the_other_work_when_it_is_not_needed(dtype, rows, width, size, rank, settled, normed):
    """An MLP and its stand-in as two launches: what each does alone, to the rounding, and only under its flag."""
    x, h = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)
    gate, up, a = (random(n, width, dtype=dtype, scale=2 * width**-0.5) for n in (size, size, rank))
    down, b = (random(width, n, dtype=dtype, scale=n**-0.5) for n in (size, rank))
    bias, norm = (
        random(width, dtype=dtype),
        (1 + random(width, dtype=dtype, scale=0.1), 1e-6, False) if normed else None,
    )
    first, second = Other(a, activation="silu"), Other(b, bias)
    for flag in (0, 1):
        need = torch.full((1,), flag, dtype=torch.int32, device="cuda")
        z, out = torch.empty(rows, size + rank, dtype=dtype, device="cuda"), h.clone()
        poison(z)
        before = z.clone()
        skinny_gated(x, gate, up, "silu", out=z, need=need, settled=settled, norm=norm, other=first)
        skinny_linear(z, [down], residual=out, out=out, need=need, settled=settled, other=second)
        twin, expected = torch.empty(rows, size + rank, dtype=dtype, device="cuda"), h.clone()
        decode_reference.skinny_gated(x, gate, up, "silu", out=twin, need=need, norm=norm, other=first)
        decode_reference.skinny_linear(twin, [down], residual=expected, out=expected, need=need, other=second)
        used = slice(0, size) if flag else slice(size, None)
        close(f"flag {flag}, inner", z[:, used], twin[:, used].float())
        close(f"flag {flag}", out, expected.float())
        if not flag:
            assert torch.equal(z[:, :size], before[:, :size]), "what is not needed is not computed"
        else:
            assert torch.equal(z[:, :size], skinny_gated(x, gate, up, "silu", norm=norm))


@pytest.mark.parametrize(("width", "size"), [(3584, 18944), (1024, 2816), (136, 400), (8192, 400)])
@pytest.mark.parametrize("rows", [1, 8, 13, 32, 64])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("rank", [0, 72])
def test_work_that_races_its_decision_ends_as_if_it_had_waited(rows, width, size, added, rank):
    """Five layers in a graph, replayed without a pause, against the same launches with a wait after each. `rank`: of stand-ins."""
    make = {"dtype": torch.bfloat16, "scale": width**-0.5}
    layers = [(random(size, width, **make), random(size, width, **make), random(width, size, **make)) for _ in range(5)]
    others = [
        (Other(random(rank, width, **make), activation="silu"), Other(random(width, rank, **make)))
        if rank
        else (None, None)
        for _ in layers
    ]
    routers = [RouterWeights.pack(router_of(width, 16, "cuda"), "cuda") for _ in layers]
    norm = torch.ones(width, dtype=torch.bfloat16, device="cuda")
    start, h, ends = (random(rows, width, dtype=torch.bfloat16) for _ in range(3))
    marks = torch.zeros(2, len(layers), dtype=torch.int32, device="cuda")
    needs, parts = marks[0], PENDING + decode.norm_route_parts(rows, width)
    limits = torch.zeros(len(layers), device="cuda")
    decided = torch.empty(rows, device="cuda"), torch.empty(rows, dtype=torch.bool, device="cuda")
    scratch = decode.norm_route_scratch(rows, width, h.device)
    more, totals = random(rows, width, dtype=torch.bfloat16), [torch.empty_like(h) for _ in layers]

    def step(races: bool) -> None:
        h.copy_(start)
        marks.fill_(PENDING)
        stream = h
        for i, (gate, up, down) in enumerate(layers):
            need, ready = needs[i : i + 1], marks[1, i : i + 1]
            x, _, _ = decode.norm_route(
                more if added else stream, norm, 1e-6, routers[i], scratch, threshold=limits[i : i + 1], needs=need,
                decided=decided, ready=ready, residual=stream if added else None, total=totals[i] if added else None,
            )  # fmt: skip
            stream = totals[i] if added else stream
            if not races:
                torch.cuda.synchronize()
            z = skinny_gated(
                x, gate, up, "silu", need=need, ready=(ready, parts) if races else None, other=others[i][0]
            )
            skinny_linear(z, [down], residual=stream, out=stream, need=need, settled=True, other=others[i][1])
        ends.copy_(stream)

    graph, _ = captured(lambda: step(True))
    seen = set()
    for pattern in (0, 31, 21, 10, 4):
        limits.copy_(torch.tensor([-1e9 if pattern >> i & 1 else 1e9 for i in range(len(layers))]))
        step(False)
        torch.cuda.synchronize()
        expected, flags = ends.clone(), needs.tolist()
        seen.add(tuple(flags))
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        assert needs.tolist() == flags
        assert torch.equal(ends, expected)
    assert seen == {(1,) * 5, (0,) * 5, (0, 1, 0, 1, 0), (1, 0, 1, 0, 1), (1, 1, 0, 1, 1)}


@pytest.mark.parametrize("rows", [9, 16, 32, 33, 64])
@pytest.mark.parametrize("dtype", HALVES)
def test_rows_of_a_batch_on_other_chips(rows, dtype, monkeypatch):
    """All of the above by batch.cu, which Hopper has no use for."""
    monkeypatch.setattr(skinny, "has_hopper_products", lambda device: False)
    for width, sizes in ((8, (1,)), (104, (17,)), (3584, (3584, 512, 512)), (18944, (40,)), (72, (3, 5, 7))):
        test_linear(dtype, rows, width, sizes, bias=width != 8)
    for activation in ("silu", "gelu", "gelu_tanh"):
        for width, size in ((384, 1024), (3584, 1000), (40, 33)):
            test_gated(dtype, rows, activation, width, size)
    for need in (0, 1):
        test_a_flag_stops_the_launch_and_nothing_is_written(rows, need)
    for width, size, rank, settled in ((3584, 18944, 192, True), (136, 400, 8, False), (8192, 1000, 2056, True)):
        test_a_launch_does_the_other_work_when_it_is_not_needed(dtype, rows, width, size, rank, settled, normed=settled)
    for width, size, added, rank in ((3584, 18944, False, 72), (1024, 2816, True, 0), (136, 400, False, 72)):
        test_work_that_races_its_decision_ends_as_if_it_had_waited(rows, width, size, added, rank)


@pytest.mark.parametrize("rows", [9, 32, 64])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("groups", [1, 7, 64, 128, 256, 384, 400, 800, 1100, 2000, 5000])
def test_every_cut_of_a_batch(rows, gated, groups):
    """Sizes around those at which Hopper's clusters grow smaller and tiles more: every row of W is there once."""
    width, size = 200, groups * (8 if gated else 16) - 3
    x = random(rows, width, dtype=torch.bfloat16)
    weight, up = (random(size, width, dtype=torch.bfloat16, scale=width**-0.5) for _ in range(2))
    out = torch.empty(rows, size, dtype=torch.bfloat16, device="cuda")
    poison(out)
    if gated:
        skinny_gated(x, weight, up, "silu", out=out)
        expected = decode_reference.skinny_gated(*(t.float() for t in (x, weight, up)), "silu")
    else:
        skinny_linear(x, [weight], out=out)
        expected = x.float() @ weight.float().T
    close(f"{rows} x {width} -> {size}", out, expected)
    again = torch.empty_like(out)
    for _ in range(3):
        skinny_gated(x, weight, up, "silu", out=again) if gated else skinny_linear(x, [weight], out=again)
        assert torch.equal(again, out), "the same sums every time"


def test_what_the_linear_kernel_does_not_take_is_named():
    x = torch.zeros(65, 64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match=r"1\.\.64 rows"):
        skinny_linear(x, [torch.zeros(4, 64, dtype=torch.bfloat16, device="cuda")])
    with pytest.raises(ValueError, match="weight"):
        skinny_linear(x[:3], [torch.zeros(4, 56, dtype=torch.bfloat16, device="cuda")])
