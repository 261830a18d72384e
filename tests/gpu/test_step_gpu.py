"""The launches at both ends of a decode step against their twins, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, captured, poison
from conftest import tiny_model

from sedac_cli.gpu import decode_reference, step
from sedac_cli.runtime.graph.lookup import Lookup
from sedac_cli.runtime.graph.ops import KernelOps
from sedac_cli.runtime.graph.state import Burst, Choice, State

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels cannot run here"),
]
ROWS = [1, 2, 3, 8, 13, 33, 64]


def state_of(rows: int, vocabulary: int, places: int) -> State:
    """Some rows have finished; the first and last stand at the ends of both tables, and beyond them where there are more."""
    tokens, position = (torch.randint(0, n, (rows,), device="cuda") for n in (vocabulary, places))
    for index, n in ((tokens, vocabulary), (position, places)):
        index[0], index[-1] = 0, n - 1
        if rows > 4:
            index[1], index[2] = n + 5, -3
    finished = torch.rand(rows, device="cuda") < 0.4
    return State(tokens, position, torch.zeros_like(tokens), finished, torch.tensor([17], device="cuda"))


def same(found, expected) -> bool:
    """Equal bits, or both nothing."""
    if expected is None or found is None:
        return found is expected
    return found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("width", "rotary", "gap"), [(8, 2, 0), (77, 6, 0), (896, 64, 3), (3584, 128, 0), (8192, 96, 8), (12305, 80, 0)]
)
def test_the_beginning(dtype, rows, width, rotary, gap):
    """`gap`: rows of the embedding that lie apart, off 16 bytes or on them."""
    torch.manual_seed(rows)
    weight = torch.randn(211, width + gap, device="cuda").to(dtype)[:, gap:]
    tables = tuple(torch.randn(50, rotary, device="cuda").to(dtype) for _ in range(2))
    state = state_of(rows, 211, 50)
    for given in ((weight, tables), (weight, None), (None, tables), (None, None)):
        h, turns, real = step.step_begin(state, *given)
        expected, both, still = decode_reference.step_begin(state, *given)
        assert same(h, expected)
        assert same(real, still)
        assert real.view(torch.uint8).max() <= 1
        assert (turns is None) == (both is None)
        assert turns is None or all(same(*pair) for pair in zip(turns, both, strict=True))


@pytest.mark.parametrize("rows", [*ROWS, 300])
@pytest.mark.parametrize("layers", [1, 28, 257])
@pytest.mark.parametrize("ends", [0, 1, 4, 5, 11])
@pytest.mark.parametrize("drawn", [False, True])
def test_the_end(rows, layers, ends, drawn):
    torch.manual_seed(rows + ends)
    state = state_of(rows, 40, 50)
    choice = Choice(
        torch.randint(0, 40, (rows,), device="cuda"), torch.rand(rows, device="cuda") * 17,
        torch.rand(rows, device="cuda").clamp_min(1e-6), -9 * torch.rand(rows, device="cuda") if drawn else None,
    )  # fmt: skip
    choice.confidence[0] = 1.0
    stop = torch.randperm(40, device="cuda")[:ends]
    needs = torch.randint(0, 2, (layers,), dtype=torch.int32, device="cuda")
    other = replace(state, **{name: value.clone() for name, value in vars(state).items()})
    found, expected = (Burst.empty(3, rows, layers, "cuda") for _ in range(2))
    for burst in (found, expected):
        poison(*vars(burst).values())
    for _ in range(2):  # what the first has ended goes on with the pad token
        step.step_end(choice, state, stop, 39, needs, found.at(1))
        decode_reference.step_end(choice, other, stop, 39, needs, expected.at(1))
        for mine, twin in ((state, other), (found, expected)):
            for name, value in vars(mine).items():
                assert same(value, getattr(twin, name)), name
    assert state.finished.view(torch.uint8).max() <= 1


def test_the_logarithm_is_torchs():
    """Of every kind of probability: near 1, near none, none, and none that is a number."""
    probability = torch.cat(
        [torch.rand(100_000), 1 - torch.rand(100_000) * 2**-10, torch.logspace(-30, 0, 100_000, base=2)]
    )
    probability = torch.cat([probability.float(), torch.tensor([1.0, 0.0, float("nan")])]).cuda()
    rows = probability.shape[0]
    zeros = torch.zeros(rows, dtype=torch.long, device="cuda")
    state, burst = State(zeros, zeros.clone(), zeros, zeros.bool(), zeros[:1].clone()), Burst.empty(1, rows, 1, "cuda")
    choice = Choice(zeros, probability, probability)
    step.step_end(choice, state, zeros[:0], 0, torch.ones(1, dtype=torch.int32, device="cuda"), burst.at(0))
    assert torch.equal(burst.logprob[0].nan_to_num(7.0), choice.logprob.nan_to_num(7.0))


def test_steps_in_a_graph_follow_each_other():
    """Both launches may begin before what is ahead of them has ended: 40 steps whose next token depends on the last."""
    torch.manual_seed(0)
    vocabulary, width, rows, steps = 4096, 3584, 8, 40
    weight = torch.randn(vocabulary, width, device="cuda").bfloat16()
    tables = tuple(torch.randn(64, 128, device="cuda").bfloat16() for _ in range(2))
    ends = torch.tensor([5, 77], device="cuda")
    start, live = state_of(rows, vocabulary, 20), state_of(rows, vocabulary, 20)
    needs = torch.ones(4, dtype=torch.int32, device="cuda")
    burst, twins = (Burst.empty(steps, rows, 4, "cuda") for _ in range(2))

    def work(way, into: Burst) -> None:
        for name, value in vars(start).items():
            getattr(live, name).copy_(value)
        for index in range(steps):
            h, (cos, _), real = way.step_begin(live, weight, tables)
            found = h.view(torch.int16)[:, :4].long().sum(dim=1) + 31 * cos.view(torch.int16)[:, 0].long()
            top = torch.where(real, 0.5, 0.25)
            way.step_end(Choice(found.remainder(vocabulary), top, top), live, ends, 3, needs, into.at(index))

    work(decode_reference, twins)
    graph, _ = captured(lambda: work(step, burst))
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    for name, value in vars(burst).items():
        assert same(value, getattr(twins, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
@torch.inference_mode()
def test_tables_are_the_module_on_this_device(dtype, family):
    """At every position, in batches of one and of eight, as a step called it before there were tables."""
    model = tiny_model(family, hidden_size=64, head_dim=16).to("cuda", dtype).model
    lookup = Lookup(model.embed_tokens, model.rotary_emb, 5000)
    assert lookup.tables is not None
    for rows in (1, 8):
        for begin in range(0, 5000, 64 if rows == 1 else rows):
            position = torch.arange(begin, begin + rows, device="cuda")
            zeros = torch.zeros_like(position)
            h, turns, _ = lookup(State(position % 97, position, zeros, zeros.bool(), zeros[:1]), KernelOps())
            assert same(h, model.embed_tokens(position % 97))
            for found, table in zip(turns, model.rotary_emb(h.unsqueeze(1), position.unsqueeze(1)), strict=True):
                assert same(found, table.reshape(rows, -1).to(dtype))


def test_what_does_not_fit_is_named():
    state = state_of(3, 10, 10)
    weight = torch.zeros(10, 16, device="cuda")
    with pytest.raises(ValueError, match="dense rows of one dtype"):
        step.step_begin(state, weight, tuple(torch.zeros(5, 4, device="cuda").bfloat16() for _ in range(2)))
    with pytest.raises(ValueError, match="dense rows"):
        step.step_begin(state, weight.t(), None)
    choice = Choice(state.tokens.int(), weight[0, :3], weight[0, :3])
    with pytest.raises(ValueError, match=r"token is \(3,\) torch.int32"):
        step.step_end(
            choice, state, state.tokens[:0], 0, torch.ones(1).int().cuda(), Burst.empty(1, 3, 1, "cuda").at(0)
        )
