"""Entropies a chunk at a time are the entropies of the whole, in any precision, and nobody's logits are written over."""

from __future__ import annotations

import math

import pytest
import torch

from sedac_cli.gpu import entropy
from sedac_cli.gpu.choose import entropy_bits
from sedac_cli.gpu.reference import (
    entropy_of_logits,
    fused_entropy,
    kl_of_logits,
    linear_bits,
    linear_entropy,
    linear_kl,
    row_chunks,
)


def by_hand(logits: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(logits.double(), dim=-1)
    return -torch.where(p > 0, p * p.clamp_min(1e-300).log2(), 0.0).sum(-1)


@pytest.mark.parametrize("rows", [0, 1, 3, 700])
@pytest.mark.parametrize("vocab", [1, 2, 97, 5000])
def test_against_float64(rows, vocab):
    logits = torch.randn(rows, vocab) * 8
    got = linear_bits(logits, lambda x: x, vocab)
    torch.testing.assert_close(got.double(), by_hand(logits), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, entropy_of_logits(logits)[0], rtol=1e-6, atol=1e-6)


def test_many_chunks_of_a_real_head():
    torch.manual_seed(0)
    hidden, head = torch.randn(3000, 8), torch.nn.Linear(8, 9000)
    with torch.no_grad():
        expected = torch.cat([by_hand(head(part)) for part in hidden.split(500)])
        got = linear_bits(hidden, head, 9000)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 3000])
def test_all_three_are_those_of_the_whole_logits(rows):
    torch.manual_seed(0)
    hidden, head = torch.randn(rows, 8), torch.nn.Linear(8, 9000)
    with torch.no_grad():
        found, logits = linear_entropy(hidden, head, 9000), head(hidden)
        torch.testing.assert_close(found.entropy, linear_bits(hidden, head, 9000), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.confidence, torch.softmax(logits, -1).amax(-1), rtol=1e-4, atol=1e-6)
        top = logits.gather(1, found.argmax[:, None]).squeeze(1)
        torch.testing.assert_close(top, logits.amax(-1), rtol=1e-5, atol=1e-5)
    for whole, part in zip(linear_entropy(logits, lambda x: x, 9000), fused_entropy(logits), strict=True):
        assert torch.equal(whole, part)


def test_a_cpu_takes_plain_torch(monkeypatch):
    def never(*args):
        raise AssertionError("a kernel on the CPU")

    monkeypatch.setattr(entropy, "linear_entropy", never)
    logits = torch.randn(5, 30)
    assert torch.equal(entropy_bits(logits, lambda x: x, 30), linear_bits(logits, lambda x: x, 30))


def test_the_logits_are_left_alone():
    logits = torch.randn(50, 300)
    before = logits.clone()
    linear_bits(logits, lambda x: x, 300)
    assert torch.equal(logits, before)


def test_half_precision_is_computed_in_float32():
    logits = (torch.randn(20, 300) * 5).bfloat16()
    assert torch.equal(linear_bits(logits, lambda x: x, 300), linear_bits(logits.float(), lambda x: x, 300))


def test_extremes():
    inf = math.inf
    logits = torch.tensor(
        [[0.0, 0.0, -inf, -inf], [1e4, 0.0, 0.0, 0.0], [-inf, -inf, 3.0, -inf], [math.nan, 0.0, 0.0, 0.0]]
    )
    for bits in (linear_bits(logits, lambda x: x, 4), entropy_of_logits(logits)[0]):
        assert bits[:3].tolist() == [1.0, 0.0, 0.0]
        assert bits[3].isnan()  # to be seen and set aside, not hidden
    assert kl_of_logits(logits[3:], logits[:1]).isnan().all()


def test_kl_in_chunks():
    torch.manual_seed(1)
    a, b, head = torch.randn(400, 6), torch.randn(400, 6), torch.nn.Linear(6, 30000)
    with torch.no_grad():
        p, q = (torch.log_softmax(head(x).double(), -1) for x in (a, b))
        torch.testing.assert_close(
            linear_kl(a, b, head, 30000).double(), (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-5
        )
        assert linear_kl(a, a, head, 30000).abs().max() == 0


def test_chunks_cover_every_row_once():
    for rows, vocab, limit in ((0, 5, 100), (1, 5, 1), (10, 10**9, 4), (103, 7, 4 * 7 * 10)):
        parts = list(row_chunks(rows, vocab, limit))
        assert [r for part in parts for r in range(part.start, part.stop)] == list(range(rows))
        assert all(part.stop - part.start <= max(1, limit // (4 * vocab)) for part in parts)
