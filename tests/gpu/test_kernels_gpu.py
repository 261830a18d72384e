"""Every kernel against its twin: dtypes, odd sizes, strided rows, 0 and 1 rows, poisoned outputs, capture and replay."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CONFIDENCE,
    DTYPES,
    ENTROPY_BITS,
    RISK,
    Probe,
    agree_away_from,
    assert_close,
    captured,
    counters_come_back,  # noqa: F401 - a fixture
    logits_of,
    poison,
    router_of,
)
from torch import Tensor

from sedac_cli.gpu import reference
from sedac_cli.gpu.choose import entropy_bits
from sedac_cli.gpu.entropy import fused_entropy, fused_entropy_decision, linear_entropy
from sedac_cli.gpu.probe import ProbeWeights, RouterWeights, probe_risk, router_score
from sedac_cli.gpu.reference import Decision, Entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("counters_come_back"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels cannot run here"),
]
INF, NAN = float("inf"), float("nan")


# Entropy -------------------------------------------------------------------------------------------------------------


def check_entropy(logits: Tensor, name: str = "") -> None:
    rows = logits.shape[:-1]
    out = Entropy(
        torch.empty(rows, device="cuda"), torch.empty(rows, device="cuda"),
        torch.empty(rows, device="cuda", dtype=torch.int64),
    )  # fmt: skip
    poison(*out)
    found, expected = fused_entropy(logits, out), reference.fused_entropy(logits)
    assert_close(f"{name} entropy", found.entropy, expected.entropy, ENTROPY_BITS)
    assert_close(f"{name} confidence", found.confidence, expected.confidence, CONFIDENCE)
    sane = ~logits.isnan().any(-1)
    assert torch.equal(found.argmax[sane], expected.argmax[sane]), f"{name}: argmax differs"
    assert ((found.argmax >= 0) & (found.argmax < logits.shape[-1])).all(), f"{name}: argmax out of range"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1000, 1001, 4099, 32000, 50257, 128256, 151936, 262144, 262143])
@pytest.mark.parametrize("rows", [0, 1, 3, 32, 33])
def test_entropy(dtype, vocab, rows):
    check_entropy(logits_of(rows, vocab, dtype), f"{dtype} {rows}x{vocab}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("rows", [1, 5, 700])
def test_entropy_of_strided_and_unaligned_rows(dtype, offset, rows):
    check_entropy(logits_of(rows, 5003, dtype, offset), f"{dtype} {rows} rows off by {offset}")
    batch = logits_of(rows * 2, 1237, dtype).view(2, rows, 1237)
    check_entropy(batch[:, -1], "last position")
    check_entropy(batch[:, : max(1, rows // 2)], "first half of each sequence")


@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(2100, 4099), (3000, 1000), (150, 50257), (1024, 32001), (150, 131073), (5000, 3), (1, 3), (9, 1)],
)
def test_entropy_of_every_cut(rows, vocab):
    """Rows per block, blocks per row, and the odd mixtures between."""
    check_entropy(logits_of(rows, vocab, torch.bfloat16), f"{rows}x{vocab}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_of_special_rows(dtype):
    vocab, low = 40001, torch.finfo(dtype).min
    logits = logits_of(9, vocab, dtype)
    logits[0, ::2] = -INF
    logits[1] = -INF
    logits[2, vocab - 1] = NAN
    logits[3, 17] = INF
    logits[4] = low
    logits[5] = low
    logits[5, 20000] = torch.finfo(dtype).max
    logits[6] = -INF
    logits[6, 39999] = -3.0
    logits[7] = 1.0  # all equal: the first is the argmax
    check_entropy(logits, "special rows")
    found = fused_entropy(logits)
    assert found.entropy[1:4].isnan().all()
    assert found.argmax[[3, 5, 6, 7]].tolist() == [17, 20000, 39999, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40, 700])
@pytest.mark.parametrize("mask", [-1e4, -65504.0, -1e5, -1e9, -1e10, -1e20, -1e30])
def test_entropy_where_a_stretch_is_masked_with_a_number(dtype, rows, mask):
    """Whole chunks that hold nothing else, before and behind the others; their probability is 0."""
    vocab = 40001
    for masked in (slice(0, 20000), slice(20000, None), slice(0, vocab - 3)):
        logits = logits_of(rows, vocab, dtype)
        logits[:, masked] = mask
        check_entropy(logits, f"{mask} at {masked}")
        assert fused_entropy(logits).entropy.isfinite().all()


@pytest.mark.parametrize("vocab", [1000, 40001])
@pytest.mark.parametrize("far", [0.0, 4096.0, 65500.0, -65500.0, -65536.0, 7e4, -7e4, 1e6, -1e6])
def test_entropy_of_logits_far_from_zero(vocab, far):
    """On both sides of where exponents begin to count from the maximum itself, and across it."""
    logits = torch.linspace(0, 60, vocab, device="cuda")[torch.randperm(vocab, device="cuda")].expand(40, -1) + far
    check_entropy(logits.contiguous(), f"around {far}")


def test_more_rows_of_short_logits_than_a_launch_takes():
    hidden = logits_of(40000, 1000, torch.bfloat16)
    found, expected = (f(hidden, lambda x: x, 1000) for f in (linear_entropy, reference.linear_entropy))
    assert_close("entropy", found.entropy, expected.entropy, ENTROPY_BITS)
    assert torch.equal(found.argmax, expected.argmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(0, 1000), (1, 32000), (33, 50257), (1500, 151936), (700, 262143)])
def test_entropy_through_a_head(dtype, rows, vocab):
    """More rows than a chunk, a chunk with one row more, and fewer; the head hands on what it is given, so all is equal."""
    logits = logits_of(rows, vocab, dtype)
    found, expected = linear_entropy(logits, lambda x: x, vocab), reference.linear_entropy(logits, lambda x: x, vocab)
    assert_close("entropy", found.entropy, expected.entropy, ENTROPY_BITS)
    assert_close("confidence", found.confidence, expected.confidence, CONFIDENCE)
    assert torch.equal(found.argmax, expected.argmax)
    assert torch.equal(entropy_bits(logits, lambda x: x, vocab), found.entropy)


def test_entropy_through_a_head_never_holds_all_logits():
    rows, vocab = 4096, 151936
    head = torch.nn.Linear(64, vocab, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        linear_entropy(hidden[:1], head, vocab)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = linear_entropy(hidden, head, vocab)
        assert torch.cuda.max_memory_allocated() - before < rows * vocab * 2 / 3
        some = torch.arange(0, rows, 97, device="cuda")
        assert_close("entropy", found.entropy[some], reference.linear_entropy(hidden[some], head, vocab).entropy, 0.02)
        graph, captured_bits = captured(lambda: entropy_bits(hidden[:7], head, vocab))
        hidden[:7] = hidden[7:14].clone()
        graph.replay()
        assert_close("replayed", captured_bits, found.entropy[7:14], 0.02)


def test_entropy_through_a_head_takes_cuda_tensors():
    with pytest.raises(RuntimeError, match="kernels take CUDA tensors"):
        linear_entropy(torch.zeros(2, 8), lambda x: x, 8)


def test_entropy_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="last axis"):
        fused_entropy(torch.zeros(4, 8, device="cuda").T)
    with pytest.raises(ValueError, match="float32, float16 and bfloat16"):
        fused_entropy(torch.zeros(4, 8, device="cuda", dtype=torch.float64))
    bad = torch.empty(3, device="cuda")
    with pytest.raises(ValueError, match=r"out\.entropy"):
        fused_entropy(torch.zeros(4, 8, device="cuda"), Entropy(bad, bad, bad))


def test_entropy_on_two_streams_at_once():
    first, second = logits_of(7, 50257, torch.bfloat16), logits_of(40, 32001, torch.float16)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    fused_entropy(first)
    torch.cuda.synchronize()
    results: list[list[Entropy]] = [[], []]
    for _ in range(50):
        for logits, stream, found in zip((first, second), streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(fused_entropy(logits))
    torch.cuda.synchronize()
    for logits, found in zip((first, second), results, strict=True):
        expected = reference.fused_entropy(logits)
        for entropy in found:
            assert_close("two streams", entropy.entropy, expected.entropy, ENTROPY_BITS)


def test_entropy_replays():
    logits = logits_of(5, 50257, torch.bfloat16)
    graph, found = captured(lambda: fused_entropy(logits))
    for _ in range(3):
        logits.copy_(logits_of(5, 50257, torch.bfloat16))
        poison(*found)
        graph.replay()
        assert_close("replay", found.entropy, reference.fused_entropy(logits).entropy, ENTROPY_BITS)


# The V9 decision -----------------------------------------------------------------------------------------------------


def check_decision(logits, hidden, before, mean, std, progress, threshold) -> None:
    rows = logits.shape[:-1]
    out = Decision(
        *(torch.empty(rows, device="cuda") for _ in range(2)), torch.empty(rows, device="cuda", dtype=torch.bool),
        torch.empty(rows, device="cuda"),
    )  # fmt: skip
    poison(*out)
    found = fused_entropy_decision(logits, hidden, before, mean, std, progress, threshold, out)
    expected = reference.fused_entropy_decision(logits, hidden, before, mean, std, progress, threshold)
    assert_close("entropy", found.entropy, expected.entropy, ENTROPY_BITS)
    assert_close("confidence", found.confidence, expected.confidence, 1e-3)
    assert_close("load", found.load, expected.load, 1e-3)
    stability = 1 - (found.load - 0.5 * (1 - found.confidence) - 0.2 * (1 - progress)) / 0.3
    agree_away_from(
        "decision", found.decision, expected.decision, expected.confidence * stability * progress,
        threshold - 0.2 * progress, 2e-3,
    )  # fmt: skip
    assert (found.decision.view(torch.uint8) <= 1).all(), "a decision was not written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "width"),
    [(0, 1000, 8), (1, 50257, 3584), (33, 1001, 77), (264, 5000, 640), (2100, 1003, 64), (600, 32001, 1000)],
)
def test_decision(dtype, hidden_dtype, rows, vocab, width):
    hidden = torch.randn(rows, width, device="cuda").to(hidden_dtype)
    before = (hidden.float() + torch.randn(rows, width, device="cuda") * 0.3).to(hidden_dtype)
    check_decision(logits_of(rows, vocab, dtype), hidden, before, 5.0, 1.5, 0.7, 0.35)


def test_decision_batched_strided_and_from_device_numbers():
    logits = logits_of(12, 32001, torch.bfloat16).view(3, 4, 32001)[:, 1:]
    hidden, before = (torch.randn(3, 4, 129, device="cuda")[:, 1:, 1:] for _ in range(2))
    numbers = [torch.tensor(x, device="cuda") for x in (5.0, 1.5, 0.35)]
    check_decision(logits, hidden, before, numbers[0], numbers[1], 0.7, numbers[2])
    check_decision(logits, torch.zeros_like(hidden), torch.zeros_like(hidden), 20.0, 1.0, 1.0, 0.5)


def test_decision_replays_with_a_new_threshold():
    logits, hidden = logits_of(6, 32000, torch.bfloat16), torch.randn(6, 256, device="cuda", dtype=torch.bfloat16)
    threshold = torch.tensor(0.0, device="cuda")
    graph, found = captured(lambda: fused_entropy_decision(logits, hidden, hidden, 30.0, 1.0, 1.0, threshold))
    for value, expected in ((0.0, True), (5.0, False), (0.1, True)):
        threshold.fill_(value)
        poison(*found)
        graph.replay()
        assert found.decision.tolist() == [expected] * 6


# Probe and router ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 8, 9, 31, 33, 257, 1025, 4096])
@pytest.mark.parametrize(("width", "rank", "precision"), [(3584, 64, "split"), (3584, 64, "plain"), (200, 10, "split"), (77, 100, "split"), (72, 64, "split"), (896, 256, "split")])  # fmt: skip
def test_probe(dtype, rows, width, rank, precision):
    probe = Probe(width, rank, bias=rank != 10).cuda()
    weights = ProbeWeights.pack(probe, "cuda")
    hidden = (torch.randn(rows, width, device="cuda") * 2).to(dtype)
    exact = reference.probe_risk(hidden, probe)
    limit = float(exact.median()) if rows else 0.0
    latched, may, real = (torch.rand(rows, device="cuda") < share for share in (0.2, 0.8, 0.7))
    expected, before = latched.clone(), latched.clone()
    needs, risk = torch.full((1,), 9, dtype=torch.int32, device="cuda"), torch.empty(rows, device="cuda")
    poison(risk)
    probe_risk(
        hidden, weights, threshold=limit, latched=latched, may_skip=may, real=real, needs=needs, precision=precision,
        out=risk,
    )  # fmt: skip
    reference.probe_risk(hidden, probe, threshold=limit, latched=expected, may_skip=may)
    tolerance = RISK[precision]
    assert_close(f"{dtype} {rows}x{width} rank {rank} {precision}", risk, exact, tolerance)
    agree_away_from("latch", latched, expected, exact, limit, tolerance)
    assert torch.equal(latched, before | ((risk < limit) & may)), "the latch does not follow the risk it reports"
    assert needs.item() == int((real & ~latched).any()), "needs does not follow the latch"


@pytest.mark.parametrize("dtype", DTYPES)
def test_probe_of_strided_rows_and_nan(dtype):
    probe = Probe(320).cuda()
    weights = ProbeWeights.pack(probe, "cuda")
    wide = (torch.randn(3, 40, 328, device="cuda") * 2).to(dtype)
    for name, hidden in (
        ("aligned", wide[:, 3:23, :320]),
        ("unaligned", wide[:, 3:23, 1:321]),
        ("last", wide[:, -1, 8:]),
    ):
        assert_close(name, probe_risk(hidden, weights), reference.probe_risk(hidden, probe), RISK["split"])
    wide[1, 5] = NAN
    latched = torch.zeros(120, dtype=torch.bool, device="cuda")
    risk = probe_risk(wide[:, :, :320], weights, threshold=1e9, latched=latched)
    assert risk[1, 5].isnan()
    assert risk.isnan().sum() == 1
    assert latched.sum() == 119
    assert not latched[45]


def test_probe_flag_when_all_or_none_are_left():
    weights = ProbeWeights.pack(Probe(256).cuda(), "cuda")
    needs = torch.full((1,), 5, dtype=torch.int32, device="cuda")
    for rows in (1, 8, 300, 3000):
        hidden = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
        for limit, expected in ((1e9, 0), (-1.0, 1), (1e9, 0)):
            probe_risk(hidden, weights, threshold=limit, needs=needs)
            assert needs.item() == expected, f"{rows} rows, threshold {limit}"
        real = torch.zeros(rows, dtype=torch.bool, device="cuda")
        probe_risk(hidden, weights, threshold=-1.0, real=real, needs=needs)
        assert needs.item() == 0, "padding asked for the MLP"


@pytest.mark.parametrize("rows", [1, 300, 2050])
def test_probe_replays(rows):
    probe = Probe(512).cuda()
    weights = ProbeWeights.pack(probe, "cuda")
    hidden = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    needs, limit = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.zeros(1, device="cuda")
    graph, risk = captured(lambda: probe_risk(hidden, weights, threshold=limit, needs=needs))
    for value, expected in ((1e9, 0), (-1.0, 1), (1e9, 0)):
        limit.fill_(value)
        hidden.copy_(torch.randn(rows, 512))
        poison(risk, needs)
        graph.replay()
        assert_close("replay", risk, reference.probe_risk(hidden, probe), RISK["split"])
        assert needs.item() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7, 32, 33, 600, 4096])
@pytest.mark.parametrize("width", [77, 128, 3584, 8192])
@pytest.mark.parametrize(("units", "offset"), [(0, 0), (16, 1), (64, 0)])
def test_router(dtype, rows, width, units, offset):
    router = router_of(width, units, "cuda")
    weights = RouterWeights.pack(router, "cuda")
    hidden = (torch.randn(rows, width + offset, device="cuda") * 3 + 1).to(dtype)[:, offset:]
    may, real = (torch.rand(rows, device="cuda") < share for share in (0.8, 0.7))
    needs = torch.full((1,), 9, dtype=torch.int32, device="cuda")
    score, run = torch.empty(rows, device="cuda"), torch.empty(rows, dtype=torch.bool, device="cuda")
    poison(score, run)
    router_score(hidden, weights, threshold=0.1, may_skip=may, real=real, needs=needs, out=(score, run))
    exact, wanted = reference.router_score(hidden, router, threshold=0.1, may_skip=may)
    assert_close(f"{dtype} {rows}x{width}", score, exact, 2e-4)
    agree_away_from("run", run, wanted, exact, 0.1, 2e-4)
    assert (run.view(torch.uint8) <= 1).all(), "a row was not written"
    assert needs.item() == int((run & real).any())
