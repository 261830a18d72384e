"""MLPs of few rows under flags, on the CPU: the kernels' twins stand for the launches, and what is launched is written down.

What cannot be seen here is time: that a launch runs beside the one ahead of it. `test_device_gpu` has that.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mlps import INNER, LAYERS, WIDTH, RMSNorm, by_hand, make_layers, routers, rows, run_layers, standins

from sedac_cli.gates.learned import LearnedGate
from sedac_cli.gates.stability import StabilityGate
from sedac_cli.gpu import decode, decode_reference, reference
from sedac_cli.gpu.skinny import PENDING
from sedac_cli.runtime.plan import Plan
from sedac_cli.standins import ZeroStandIn
from sedac_cli.standins.lowrank import LowRankStandIns
from sedac_cli.vllm import captured, dense_mlp
from sedac_cli.vllm.dense_mlp import DenseMlp
from sedac_cli.vllm.forced import ForcedGate
from sedac_cli.vllm.settings import read_settings

CLOSE = {"rtol": 2e-2, "atol": 6e-2}
"""Of streams in bfloat16 whose sums were taken in another order."""


class Recorder:
    """The launches of a pass in order, each with what it was told and the flag it found; the twins do the work."""

    def __init__(self, gate):
        self.gate, self.launches = gate, []

    def router_score(self, x, weights, *, needs, threshold, may_skip, real, arm, out=None, scratch=None):
        assert arm is None
        self.launches.append(
            {"what": "router", "flag": needs.data_ptr(), "was": int(needs), "memory": None if out is None else (*out, scratch)}
        )  # fmt: skip
        router = self.router_of(weights)
        return reference.router_score(x, router, threshold=threshold, may_skip=may_skip, real=real, needs=needs)

    def router_of(self, weights):
        return self.gate.routers[next(k for k, w in self.weights.items() if w is weights)]

    def norm_route(self, x, weight, eps, weights, scratch, *, needs, arm, decided, ready, residual, total, **decision):
        assert arm is None
        assert total.data_ptr() not in (x.data_ptr(), residual.data_ptr())
        self.launches.append(
            {"what": "norm and router", "flag": needs.data_ptr(), "was": int(needs), "memory": (*decided, scratch)}
        )  # fmt: skip
        found = decode_reference.norm_route(
            x, weight, eps, self.router_of(weights), needs=needs, residual=residual, total=total, **decision
        )
        if ready is not None:
            ready += decode.norm_route_parts(*x.shape)
        return found

    def gated(self, x, gate, up, activation, *, need, settled=False, racing=False, ready=None, other=None):
        waits = None if ready is None else (int(ready[0]), ready[1])
        self.launches.append(
            {"what": "gated", "flag": need.data_ptr(), "was": int(need), "settled": settled, "racing": racing, "ready": waits,
             "other": other}
        )  # fmt: skip
        width = gate.shape[0] + (0 if other is None else other.weight.shape[0])
        out = torch.full((x.shape[0], width), float("nan"), dtype=x.dtype)  # half of it is nobody's to read
        return decode_reference.skinny_gated(x, gate, up, activation, out=out, need=need, other=other)

    def linear(self, x, weights, biases=None, *, need, settled=False, other=None, **more):
        self.launches.append({"what": "down", "flag": need.data_ptr(), "settled": settled, "other": other})
        return decode_reference.skinny_linear(x, weights, biases, need=need, other=other, **more)

    def words(self):
        return [launch["what"] for launch in self.launches]


@pytest.fixture
def pretend(monkeypatch):
    """A session that believes it is captured on a GPU. What a launch does not write is not a number."""

    def make(gate, standin, whole=True, layers=None, joined=False):
        from sedac_cli.vllm.device import DeviceSession

        recorder = Recorder(gate)
        monkeypatch.setattr(captured, "ConditionalGraph", lambda device: None)
        monkeypatch.setattr(captured, "router_score", recorder.router_score)
        monkeypatch.setattr(dense_mlp, "skinny_gated", recorder.gated)
        monkeypatch.setattr(dense_mlp, "skinny_linear", recorder.linear)
        monkeypatch.setattr(decode, "norm_route", recorder.norm_route)
        monkeypatch.setattr(decode, "add_rms_norm", decode_reference.add_rms_norm)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))
        layers = layers or make_layers()
        settings = read_settings({"gate": "never", "mlp": "kernels"}, {})
        session = DeviceSession(settings, Plan(gate, standin), layers, torch.device("cpu"), 64)
        session.capture.whole = lambda: whole
        recorder.weights = session.capture.routers
        if joined:
            session.join_norms()
        return session, layers, recorder

    return make


def one_pass(session, layers, x, step):
    session.begin(step)
    with torch.no_grad():
        out = run_layers(session, layers, x)
    session.end()
    return out


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("limit", [-1e9, 0.0, 1e9])
@pytest.mark.parametrize("which", ["none", "all", "some"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_pass_is_what_the_gate_says(pretend, which, limit, count, whole, joined):
    standin = {"none": ZeroStandIn(), "all": standins(), "some": standins(layers=[2])}[which]
    session, layers, recorder = pretend(LearnedGate(LAYERS, routers(), limit), standin, whole, joined=joined)
    assert sorted(session.norms) == (session.gated if joined else [])
    expected_skips = [0] * LAYERS
    for number in range(3):
        recorder.launches.clear()
        x, step = torch.randn(count, WIDTH).bfloat16(), rows(count)
        out, off = one_pass(session, layers, x, step), []
        expected = by_hand(LearnedGate(LAYERS, routers(), limit), standin, layers, x, step, off)
        torch.testing.assert_close(out.float(), expected.float(), **CLOSE)
        for layer in off:
            expected_skips[layer] += count
        session.add_up()
        assert session.counters.skipped.tolist() == expected_skips, number
        assert session.seen == count * (number + 1)
        assert int(session.capture.flags.min()) >= 0, "no flag may stay undecided"
    if limit:
        assert sum(expected_skips) == (9 * count if limit < 0 else 0)


def test_rows_that_are_padding_or_must_run_decide_as_ever(pretend):
    standin = standins()
    session, layers, _ = pretend(LearnedGate(LAYERS, routers(), -1e9), standin)
    x = torch.randn(8, WIDTH).bfloat16()
    one_pass(session, layers, x, rows(3))
    session.add_up()
    assert session.counters.skipped.tolist() == [0, 3, 3, 3]
    step = rows(8, dense=np.arange(8) == 7)
    out = one_pass(session, layers, x, step)
    torch.testing.assert_close(out.float(), by_hand(session.gate, standin, layers, x, step).float(), **CLOSE)
    session.add_up()
    assert session.counters.skipped.tolist() == [0, 3, 3, 3]


@pytest.mark.parametrize("which", ["none", "all"])
def test_an_mlp_that_races_its_router_waits_for_its_rows_alone(pretend, which):
    standin = standins() if which == "all" else ZeroStandIn()
    session, layers, recorder = pretend(LearnedGate(LAYERS, routers(), 0.0), standin, joined=True)
    for _ in range(2):  # in the second pass no counter may begin where the first left it
        recorder.launches.clear()
        one_pass(session, layers, torch.randn(2, WIDTH).bfloat16(), rows(2))
        each = ["norm and router", "gated", "down"]
        assert recorder.words() == each * 3
        for place in range(3):
            router, gated, *rest = recorder.launches[place * len(each) : (place + 1) * len(each)]
            assert router["was"] == PENDING
            assert gated["flag"] == router["flag"] == session.capture.flags[place : place + 1].data_ptr()
            assert gated["racing"]
            assert gated["ready"] == (PENDING + 2, PENDING + 2), "a part for each of two rows of one slice"
            assert all(launch["settled"] and launch["flag"] == router["flag"] for launch in rest)
            assert all((launch["other"] is not None) == (which == "all") for launch in (gated, *rest))
        kept = [t.data_ptr() for t in session.capture.few.memory]
        assert all(
            [t.data_ptr() for t in launch["memory"]] == kept
            for launch in recorder.launches
            if launch["what"] == "norm and router"
        )


@pytest.mark.parametrize("what", ["another class", "another rule", "another size"])
def test_a_norm_that_is_not_known_stays_and_its_router_is_a_launch(pretend, what):
    """In the midst of others that are known."""
    layers = make_layers()
    norm = layers[2].module.norm
    if what == "another class":
        norm.__class__ = type("OtherNorm", (RMSNorm,), {})
    elif what == "another rule":
        norm.__class__ = type(
            "RMSNorm", (RMSNorm,), {"forward": lambda self, x, r: (2 * RMSNorm.forward(self, x, r)[0], x + r)}
        )
    else:
        norm.variance_size_override = WIDTH // 2
    gate = LearnedGate(LAYERS, routers(), 0.0)
    session, _, recorder = pretend(gate, ZeroStandIn(), layers=layers, joined=True)
    assert sorted(session.norms) == [1, 3]
    one_pass(session, layers, torch.randn(2, WIDTH).bfloat16(), rows(2))
    behind = ["gated", "down"]
    assert recorder.words() == ["norm and router", *behind, "router", *behind, "norm and router", *behind]
    assert [launch["ready"] is None for launch in recorder.launches if launch["what"] == "gated"] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("which", ["none", "all"])
def test_an_mlp_races_the_router_just_ahead_of_it(pretend, which):
    session, layers, recorder = pretend(
        LearnedGate(LAYERS, routers(), 0.0), standins() if which == "all" else ZeroStandIn()
    )
    one_pass(session, layers, torch.randn(2, WIDTH).bfloat16(), rows(2))
    each = ["router", "gated", "down"]
    assert recorder.words() == each * 3
    for place in range(3):
        router, gated, *rest = recorder.launches[place * len(each) : (place + 1) * len(each)]
        assert router["was"] == PENDING, "set once, when the pass begins"
        assert gated["flag"] == router["flag"] == session.capture.flags[place : place + 1].data_ptr()
        assert gated["racing"]
        assert all(launch["settled"] and launch["flag"] == router["flag"] for launch in rest)
    held = [launch["memory"] for launch in recorder.launches if launch["what"] == "router"]
    kept = session.capture.few.memory
    for score, run, scratch in held:  # of its own, and the same for all layers: nobody is given it while a router runs
        assert score.shape == run.shape == (2,)
        assert [t.data_ptr() for t in (score, run, scratch)] == [t.data_ptr() for t in kept]


@pytest.mark.parametrize("joined", [True, False])
def test_in_a_piece_of_a_graph_nothing_races(pretend, joined):
    session, layers, recorder = pretend(LearnedGate(LAYERS, routers(), 0.0), standins(), whole=False, joined=joined)
    one_pass(session, layers, torch.randn(2, WIDTH).bfloat16(), rows(2))
    assert recorder.words()[0] == ("norm and router" if joined else "router")
    for launch in recorder.launches:
        assert not launch.get("racing")
        assert launch.get("ready") is None
        assert launch.get("was") != PENDING
        assert joined or launch.get("memory") is None


def test_flags_that_are_known_are_waited_for_once(pretend):
    session, layers, recorder = pretend(ForcedGate(LAYERS, [1]), standins(layers=range(LAYERS)))
    x = torch.randn(2, WIDTH).bfloat16()
    out = one_pass(session, layers, x, rows(2))
    torch.testing.assert_close(out.float(), by_hand(session.gate, session.standin, layers, x, rows(2)).float(), **CLOSE)
    gated = [launch for launch in recorder.launches if launch["what"] == "gated"]
    assert [launch["settled"] for launch in gated] == [False, True, True, True]
    assert not any(launch["racing"] for launch in gated)


def test_a_rule_in_torch_is_waited_for(pretend):
    gate = StabilityGate(LAYERS, tau=-0.9, k=1, min_layer=2)
    session, layers, recorder = pretend(gate, standins())
    x = torch.randn(2, WIDTH).bfloat16()
    out = one_pass(session, layers, x, rows(2))
    fresh = StabilityGate(LAYERS, tau=-0.9, k=1, min_layer=2)
    torch.testing.assert_close(out.float(), by_hand(fresh, session.standin, layers, x, rows(2)).float(), **CLOSE)
    assert not any(launch.get("settled") for launch in recorder.launches if launch["what"] == "gated")


@pytest.mark.parametrize("joined", [True, False])
def test_a_stand_in_of_another_kind_is_run_in_torch(pretend, joined):
    """On the rows that the MLP would have had: with a norm that is launched with its router, not on those from before it."""

    class Watched(LowRankStandIns):
        pass

    standin = Watched(standins().by_layer)
    session, layers, recorder = pretend(LearnedGate(LAYERS, routers(), -1e9), standin, joined=joined)
    x = torch.randn(2, WIDTH).bfloat16()
    out = one_pass(session, layers, x, rows(2))
    torch.testing.assert_close(out.float(), by_hand(session.gate, standin, layers, x, rows(2)).float(), **CLOSE)
    assert recorder.words() == ["norm and router" if joined else "router", "gated", "down"] * 3


@pytest.mark.parametrize("limit", [-1e9, 1e9])
def test_over_two_gpus_one_rank_stands_in(pretend, monkeypatch, limit):
    """What the ranks give is summed; each holds half of the inner width."""
    monkeypatch.setattr(DenseMlp, "reduce", lambda self, y: y)
    standin, whole = standins(), make_layers()
    x, parts = torch.randn(3, WIDTH).bfloat16(), []
    for rank in (0, 1):
        layers = make_layers()
        half = slice(rank * INNER // 2, (rank + 1) * INNER // 2)
        for layer in layers:
            first, last = layer.mlp.gate_up_proj, layer.mlp.down_proj
            first.weight.data = torch.cat([part[half] for part in first.weight.data.chunk(2)])
            last.weight.data = last.weight.data[:, half].contiguous()
            last.tp_size, last.tp_rank = 2, rank
        session, layers, recorder = pretend(LearnedGate(LAYERS, routers(), limit), standin, layers=layers)
        session.begin(rows(3))
        with torch.no_grad():
            parts.append([session.mlp(layer, x).float() for layer in session.gated])
        session.end()
        others = [launch["other"] is not None for launch in recorder.launches if launch["what"] in ("gated", "down")]
        assert others == [rank == 0] * 6
    for place, layer in enumerate(range(1, LAYERS)):
        expected = whole[layer].mlp(x) if limit > 0 else standin.rows(layer, x)
        torch.testing.assert_close(parts[0][place] + parts[1][place], expected.float(), **CLOSE)
        if limit < 0:
            assert not parts[1][place].any()
