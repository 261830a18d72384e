"""The twins against brute force in float64: what they say is what the kernels are held to."""

from __future__ import annotations

import math

import pytest
import torch
from cases import router_of

from sedac_cli.gpu import compile as compiling
from sedac_cli.gpu import conditional, decode_reference, entropy, probe, reference, route, skinny
from sedac_cli.probes import LREProbe

INF, NAN = float("inf"), float("nan")


def brute_entropy(row: torch.Tensor) -> tuple[float, float, int]:
    logits = [float(value) for value in row.double()]
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    total = sum(weights)
    bits = -sum(w / total * math.log2(w / total) for w in weights if w > 0)
    return bits, 1.0 / total, logits.index(top)


@pytest.mark.parametrize("shape", [(0, 17), (1, 1), (1, 1000), (3, 1001), (2, 2, 37)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_entropy_is_the_definition(shape, dtype):
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    found = reference.fused_entropy(logits)
    assert found.entropy.shape == found.confidence.shape == found.argmax.shape == shape[:-1]
    rows = logits.reshape(-1, shape[-1])
    for i, row in enumerate(rows):
        bits, largest, best = brute_entropy(row)
        assert found.entropy.flatten()[i].item() == pytest.approx(bits, abs=2e-5)
        assert found.confidence.flatten()[i].item() == pytest.approx(largest, rel=1e-5)
        assert found.argmax.flatten()[i].item() == best


def test_entropy_of_more_rows_than_one_chunk(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * 50 * 3)
    logits = torch.randn(10, 50)
    whole = reference.entropy_of_logits(logits)
    assert all(torch.equal(a, b) for a, b in zip(reference.fused_entropy(logits), whole, strict=True))


def test_special_logits():
    low = torch.finfo(torch.float32).min
    rows = torch.tensor(
        [
            [-INF, 1.0, 1.0, -INF],  # probability 0 twice
            [NAN, 1.0, 2.0, 3.0],
            [INF, 1.0, 2.0, 3.0],
            [-INF, -INF, -INF, -INF],
            [3e38, -3e38, low, -INF],  # differences beyond float32
            [low, low, low, low],
        ]
    )
    found = reference.fused_entropy(rows)
    assert found.entropy[[0, 4, 5]].tolist() == pytest.approx([1.0, 0.0, 2.0])
    assert found.confidence[[0, 4, 5]].tolist() == pytest.approx([0.5, 1.0, 0.25])
    assert found.entropy[1:4].isnan().all()
    assert found.confidence[1:4].isnan().all()
    assert found.argmax[[0, 2, 4]].tolist() == [1, 0, 0]
    assert ((found.argmax >= 0) & (found.argmax < 4)).all()


def test_decision_is_the_v9_rule():
    torch.manual_seed(0)
    logits, now = torch.randn(5, 300) * 3, torch.randn(5, 24)
    before = now + torch.randn(5, 24) * torch.tensor([0.0, 0.1, 1.0, 10.0, 0.5])[:, None]
    mean, std, p, t = 5.0, 1.5, 0.75, 0.3
    found = reference.fused_entropy_decision(logits, now, before, mean, std, p, t)
    for i in range(5):
        bits = brute_entropy(logits[i])[0]
        conf = 1 / (1 + math.exp(-2 * (mean - bits) / std))
        stab = 1 / (1 + math.dist(now[i].tolist(), before[i].tolist()) / math.hypot(*now[i].tolist()))
        assert found.confidence[i].item() == pytest.approx(conf, rel=1e-4)
        assert bool(found.decision[i]) == (conf * stab * p > t - 0.2 * p)
        assert found.load[i].item() == pytest.approx(0.5 * (1 - conf) + 0.3 * (1 - stab) + 0.2 * (1 - p), rel=1e-4)
    assert found.decision.any()
    assert not found.decision.all()


def test_decision_with_nan_or_a_zero_state_never_skips_by_accident():
    logits, zero = torch.zeros(2, 10), torch.zeros(2, 4)
    logits[0, 0] = NAN
    found = reference.fused_entropy_decision(logits, zero, zero, 9.0, 1.0, 1.0, 0.5)
    assert found.decision.tolist() == [False, True]  # 0/0 counts as "has not moved"


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("rank", [1, 10, 64])
def test_probe_risk_is_the_probe(rows, rank):
    torch.manual_seed(rows)
    probe_, hidden = LREProbe(33, rank).requires_grad_(False), torch.randn(rows, 33)
    found = reference.probe_risk(hidden, probe_)
    assert torch.allclose(found.double(), _double_probe(probe_.double(), hidden.double()), atol=1e-5)


def _double_probe(probe_: LREProbe, hidden: torch.Tensor) -> torch.Tensor:
    z = hidden @ probe_.proj.weight.T + probe_.proj.bias
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + probe_.norm.eps).sqrt()
    y = (z * probe_.norm.weight + probe_.norm.bias) @ probe_.head.weight.T + probe_.head.bias
    return torch.log1p(y.exp()).squeeze(-1)


def test_probe_latches_what_fires_and_may():
    probe_ = LREProbe(8, 4).requires_grad_(False)
    hidden = torch.randn(6, 8)
    hidden[5] = NAN
    risk = reference.probe_risk(hidden, probe_)
    limit = float(risk[:5].median())
    latched = torch.tensor([True, False, False, False, False, False])
    may = torch.tensor([True, True, True, False, True, True])
    needs = torch.zeros(1, dtype=torch.int32)
    reference.probe_risk(hidden, probe_, threshold=limit, latched=latched, may_skip=may, needs=needs)
    expected = [True, *[bool(risk[i] < limit) and bool(may[i]) for i in range(1, 6)]]
    assert latched.tolist() == expected
    assert not latched[5]  # NaN
    assert needs.item() == 1
    real = latched.clone()  # nobody else is real: nothing is left to run
    reference.probe_risk(hidden, probe_, threshold=limit, latched=latched, may_skip=may, real=real, needs=needs)
    assert needs.item() == 0


def test_router_score():
    router = router_of(9, 2)
    hidden = torch.randn(2, 3, 9)
    hidden[1, 2] = NAN
    needs = torch.zeros((), dtype=torch.int32)
    may = torch.ones(2, 3, dtype=torch.bool)
    may[0, 0] = False
    score, run = reference.router_score(hidden, router, threshold=0.1, may_skip=may, needs=needs)
    x = hidden.double()
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    z = normal @ router.inner.double().T
    exact = normal @ router.weight.double() + (z / (1 + (-z).exp())) @ router.outer.double() + router.bias.double()
    assert torch.allclose(score.double(), exact, atol=1e-5, equal_nan=True)
    assert run[0, 0]
    assert run[1, 2]
    assert torch.equal(run.flatten()[1:5], (exact <= 0.1).flatten()[1:5])
    assert needs.item() == 1


@pytest.mark.parametrize("rows", [0, 1, 2, 33])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_routing_is_stable_and_comes_back(rows, share):
    torch.manual_seed(rows)
    hidden, leaves = torch.randn(rows, 5), torch.rand(rows) < share
    found = reference.route_split(hidden, leaves)
    stay, gone = [i for i in range(rows) if not leaves[i]], [i for i in range(rows) if leaves[i]]
    assert found.counts.tolist() == [len(stay), len(gone)]
    assert found.active_indices[: len(stay)].tolist() == stay
    assert found.exit_indices[: len(gone)].tolist() == gone
    assert torch.equal(found.active[: len(stay)], hidden[stay])
    assert torch.equal(found.exit[: len(gone)], hidden[gone])
    assert torch.equal(reference.route_merge(found.active, found.exit, found.slot), hidden)
    packed = reference.gather_rows(hidden, torch.where(leaves, 0.0, 0.5))
    assert torch.equal(packed.rows[: len(stay)], hidden[stay])
    back = reference.scatter_rows(packed.rows, packed.slot)
    assert torch.equal(back, torch.where(leaves[:, None], 0.0, hidden))


# Asking for a kernel where there is no GPU -------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_says_so():
    compiling.require_gpu.cache_clear()
    with pytest.raises(RuntimeError, match="no CUDA device"):
        compiling.require_gpu()
    with pytest.raises(RuntimeError, match="no CUDA device"):
        conditional.ConditionalGraph()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: entropy.fused_entropy(x),
        lambda x: probe.probe_risk(x, probe.ProbeWeights.pack(LREProbe(4, 2), "cpu")),
        lambda x: probe.router_score(x, probe.RouterWeights.pack(router_of(4), "cpu")),
        lambda x: route.route_split(x, torch.ones(2, dtype=torch.bool)),
        lambda x: route.gather_rows(x, torch.ones(2)),
    ],
)
def test_a_cpu_tensor_is_refused_not_computed(call):
    with pytest.raises(RuntimeError, match="kernels take CUDA tensors"):
        call(torch.zeros(2, 4))


def test_every_cut_covers_its_rows():
    """The kernel's bookkeeping: chunks cover a row once, none is empty, counters fit, and waves are nearly full."""
    few, many = entropy.FEW.resident(132, 228 * 1024), entropy.MANY.resident(132, 228 * 1024)
    for decision in (False, True):
        for rows, vocab in ((1, 3), (1, 1000), (1, 262144), (7, 32001), (5000, 1000), (32768, 262143), (264, 5000)):
            cut = entropy.cut_of(rows, vocab, few, many, decision)
            assert cut.parts * cut.chunk >= vocab > (cut.parts - 1) * cut.chunk
            assert rows * cut.parts < 2**31
            if cut.group == entropy.FEW.group:
                assert rows * cut.parts == cut.blocks <= few - rows * decision
            else:
                assert 0 < cut.blocks <= many
        for rows in range(33, 8193, 37):
            cut = entropy.cut_of(rows, 151936, few, many, decision)
            apart = rows * decision if cut.group == entropy.FEW.group else 0
            rounds = (rows * cut.parts + apart) / (few if cut.group == entropy.FEW.group else many * entropy.WARPS)
            assert rounds / math.ceil(rounds) > 0.8, f"{rows} rows: {rounds:.2f} rounds"


@pytest.mark.parametrize("gated", [False, True])
def test_rows_of_a_matrix_are_shared_out_evenly(gated):
    """No block does more than its neighbour by a tile's rows and a row, no tile is taller than 16, and few rows are few blocks."""
    for rows in (1, 2, 17, 40, 300, 400, 1000, 2112, 3584, 4096, 4608, 8448, 8449, 12672, 18944, 152064, 262144):
        cut = skinny.cut_of(rows, gated, 132)
        tallest = -(-rows // cut.items)
        assert tallest <= 16 * cut.tiles
        assert cut.grid == min(cut.items, 264)
        assert rows // cut.items > 0
        if cut.loop:
            assert cut.items % cut.grid == 0
        elif cut.items < 264:
            assert tallest <= 8
    assert skinny.cut_of(3584, False, 132) == skinny.Cut(1, 264, 264)
    assert skinny.cut_of(4608, False, 132) == skinny.Cut(2, 264, 264)
    assert skinny.cut_of(18944, True, 132) == skinny.Cut(1, 264 * 5, 264)


def test_no_warp_asks_for_more_of_x_than_its_item_has():
    """Behind the last step comes the first of the next item: asked for further on, it would be a step that is not there."""
    for width in range(8, 4097, 8):
        steps = {len(range(warp * 32, width, 32 * skinny.WARPS)) for warp in range(skinny.WARPS)} - {0}
        assert skinny.steps_ahead(width) == min(skinny.X_AHEAD, *steps)


def test_a_form_takes_as_many_blocks_as_its_shared_memory_allows():
    assert entropy.Form(8, 4, 4).resident(10, 100 * 1024) == 40
    assert entropy.Form(1, 4, 4, 3).shared == 8 * 3 * 4 * 32 * 16
    assert entropy.Form(1, 4, 4, 3).resident(10, 228 * 1024) == 40
    assert entropy.Form(1, 4, 4, 3).resident(10, 100 * 1024) == 20
    assert entropy.Form(1, 8, 4, 6).resident(10, 100 * 1024) == 10


def test_a_probe_forms_clusters_where_they_win():
    """Hopper alone: eight blocks a tile up to 512 rows, four while all run at once on 132 multiprocessors (33 tiles), then two."""

    def shape(rows: int, hopper: bool = True) -> probe.TileShape:
        return probe.tile_shape(rows, 64, 3584, 132, hopper)

    assert [shape(rows).splits for rows in (9, 512, 513, 2112, 2113, 8192)] == [8, 8, 4, 4, 2, 2]
    assert all(shape(rows).cluster for rows in (9, 512, 8192))
    assert not any(shape(rows, hopper=False).cluster for rows in (9, 512, 8192))


def test_launches_no_device_takes_are_refused_by_name():
    compiling.refuse_shared("probe", 1024, 226 * 1024, 227 * 1024)
    with pytest.raises(RuntimeError, match="asks for 232448 bytes"):
        compiling.refuse_shared("probe", 16, 227 * 1024, 227 * 1024)
    compiling.refuse_shape("probe", (64, 1, 4), 128)
    for grid, threads in (((0, 1, 1), 32), ((1, 70000, 1), 32), ((1,), 0), ((1,), 2048)):
        with pytest.raises(RuntimeError, match="no device takes"):
            compiling.refuse_shape("probe", grid, threads)
    assert probe.shared_bytes(32, 1, 4) == compiling.DEFAULT_SHARED  # with the kernel's own, this one is above it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_a_norm_of_a_sum_is_what_a_model_of_hugging_face_does(family, dtype):
    """Which rounds the sum first: that the two orders differ at all is seen, too."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    torch.manual_seed(0)
    norm = (GemmaRMSNorm if family == "gemma" else Qwen2RMSNorm)(96, eps=1e-6).to(dtype).requires_grad_(False)
    norm.weight.normal_()
    x, residual = (torch.randn(40, 96).to(dtype) for _ in range(2))
    expected = norm(x + residual)
    found, total = decode_reference.add_rms_norm(x, residual, norm.weight, 1e-6, family == "gemma")
    assert torch.equal(total, x + residual)
    assert torch.equal(found, expected)
    later = decode_reference.rms_norm(x.float() + residual.float(), norm.weight, 1e-6, family == "gemma").to(dtype)
    assert torch.equal(later, expected) == (dtype == torch.float32)
    router, total = router_of(96, 4), torch.empty_like(x)
    needs = torch.full((1,), 9, dtype=torch.int32)
    y, score, run = decode_reference.norm_route(
        x,
        norm.weight,
        1e-6,
        router,
        threshold=0.1,
        plus_one=family == "gemma",
        needs=needs,
        residual=residual,
        total=total,
    )
    assert torch.equal(y, expected)
    assert torch.equal(total, x + residual)
    assert torch.equal(score, router(expected))
    assert torch.equal(run, ~(score > 0.1))
    assert needs.item() == int(run.any())
