"""Distillation: the closed-form start, the budget, the gradient that holds it, and a file that runs as it was trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from sedac_cli.artifacts.gates_file import GatesFile
from sedac_cli.artifacts.manifest import ModelIdentity
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.learned import Router
from sedac_cli.pipeline.distill.blend import blended
from sedac_cli.pipeline.distill.curve import measure_curve
from sedac_cli.pipeline.distill.loop import exported
from sedac_cli.pipeline.distill.scan import Moments, spread_ranks, start
from sedac_cli.pipeline.distill.train import DistillOptions, LatchRouter, Trainer
from sedac_cli.runtime.plan import make_plan
from sedac_cli.runtime.skip import skipping
from sedac_cli.standins.lowrank import LowRank
from sedac_cli.structure import find_decoder

IDENTITY = ModelIdentity(
    ref="test", architecture={}, config_digest="", tokenizer_digest="", dtype="float32", weights_sample=[]
)


@pytest.fixture
def loaded():
    model = tiny_model(num_hidden_layers=6)
    return SimpleNamespace(model=model, decoder=find_decoder(model), device=torch.device("cpu"), identity=IDENTITY)


@pytest.fixture
def windows():
    return torch.randint(3, 97, (120, 24), dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def options(**changes):
    return DistillOptions(**({"steps": 8, "batch_size": 6, "rank": 8, "target_skip": 0.3} | changes))


def write(trainer: Trainer, path, curve):
    kind = trainer.options.gate
    routers = {layer: exported(m.probe if isinstance(m, LatchRouter) else m) for layer, m in trainer.routers.items()}
    standins = {layer: exported(m) for layer, m in trainer.standins.items()}
    recipe = {"options": {"target_skip": trainer.options.target_skip}}
    GatesFile(kind, IDENTITY, trainer.options.sinks, routers, standins, curve, recipe).write(path)


def test_the_start_is_the_linear_map_when_the_rank_allows():
    torch.manual_seed(0)
    weight, bias = torch.randn(12, 12), torch.randn(12)
    standin = LowRank.from_linear(weight, bias, rank=24, scale=torch.rand(12) + 0.5)
    x = torch.randn(50, 12)
    torch.testing.assert_close(standin(x), x @ weight + bias, rtol=1e-4, atol=1e-4)


def test_the_start_recovers_a_low_rank_mlp_from_moments():
    torch.manual_seed(0)
    weight = torch.randn(16, 3) @ torch.randn(3, 16)
    moments = Moments(torch.zeros(17, 17, dtype=torch.float64), torch.zeros(17, 16, dtype=torch.float64))
    x = torch.randn(4000, 16) * torch.linspace(0.1, 3, 16)
    moments.add(x, x @ weight + 1.0)
    error = (start(moments, rank=6, ridge=1e-6)(x) - (x @ weight + 1.0)).norm() / (x @ weight).norm()
    assert error < 1e-3
    worse = (start(moments, rank=2, ridge=1e-6)(x) - (x @ weight + 1.0)).norm() / (x @ weight).norm()
    assert worse > 0.1


def test_ranks_go_where_harm_is():
    """Two layers alike but for their harm, a third whose map has one direction only: it has no use for more."""
    torch.manual_seed(0)
    x = torch.randn(3000, 16)
    noise = 0.5 * torch.randn(3000, 16)
    full, single = torch.randn(16, 16), torch.randn(16, 1) @ torch.randn(1, 16)
    moments = {}
    for layer, weight in ((0, full), (1, full), (2, single)):
        moments[layer] = Moments.of(16, 16, torch.device("cpu"))
        moments[layer].add(x, x @ weight + noise)
    ranks = spread_ranks(moments, {0: 0.4, 1: 0.02, 2: 0.2}, (0, 1, 2), rank=8)
    assert sum(ranks.values()) == 24
    assert ranks[2] == 2
    assert ranks[0] > ranks[1]
    even = spread_ranks(moments, {0: 0.1, 1: 0.1, 2: 0.1}, (0, 1), rank=8)
    assert even == {0: 8, 1: 8}


def test_the_error_behind_the_ranks_is_that_of_the_standin():
    moments = Moments.of(6, 6, torch.device("cpu"))
    x = torch.randn(500, 6)
    y = torch.randn(500, 6)
    moments.add(x[:200], y[:200])
    moments.add(x[200:], y[200:])
    assert moments.yy == pytest.approx(float(y.pow(2).sum()), rel=1e-5)


def test_the_file_keeps_the_rank_of_each_layer(loaded, windows, tmp_path):
    trainer = Trainer(loaded, windows, options(rank_by="importance", steps=3, layers=(1, 2, 3, 4)))
    assert sum(trainer.ranks.values()) == 4 * 8
    trainer.run()
    write(trainer, tmp_path / "g.pth", [{"share": 0.2, "limit": 0.0}])
    standin = make_plan(f"learned:{tmp_path / 'g.pth'}@0.2", loaded.decoder).standin
    assert {x: m.rank for x, m in standin.by_layer.items()} == trainer.ranks
    assert all(standin.cost_per_token(x) == 4 * 32 * rank for x, rank in trainer.ranks.items())


def test_no_router_gains_by_moving_all_scores_alike(loaded, windows):
    trainer = Trainer(loaded, windows, options())
    for module in (*trainer.routers.values(), *trainer.standins.values()):
        module.requires_grad_(True)
    with blended(loaded.decoder, trainer.standins, trainer.routers, latch=False, sinks=2) as control:
        trainer.compute(control, 0.5)  # the first step of all fills the table of limits
        for module in trainer.routers.values():
            module.zero_grad()
        trainer.compute(control, 0.5)
    biases = torch.tensor([float(router.bias.grad) for router in trainer.routers.values()])
    assert biases.abs().max() > 0
    assert abs(biases.sum()) < 1e-4 * biases.abs().sum()


def test_off_and_closed_the_model_is_bit_identical(loaded, windows):
    ids = windows[:4].long()
    stock = loaded.model(ids).logits
    modules = list(loaded.model.named_modules())
    trainer = Trainer(loaded, windows, options())
    trainer.run()
    assert torch.equal(loaded.model(ids).logits, stock)
    assert [name for name, _ in loaded.model.named_modules()] == [name for name, _ in modules]
    with blended(loaded.decoder, trainer.standins, trainer.routers, latch=False, sinks=4) as control:
        control.on = False
        assert torch.equal(loaded.model(ids).logits, stock)


@pytest.mark.parametrize("gate", ["learned", "cascade"])
def test_the_file_runs_as_it_was_trained(loaded, windows, tmp_path, gate):
    """The packed runtime with the file's limit makes the choices, and the logits, of the training form."""
    trainer = Trainer(loaded, windows, options(gate=gate, steps=30, checkpoints=(1, 3) if gate == "cascade" else None))
    trainer.run()
    held = windows[:16]
    curve = measure_curve(trainer, held, shares=(0.1, 0.2, 0.3, 0.4))
    path = tmp_path / "gates.pth"
    write(trainer, path, curve)
    row = curve[2]
    assert abs(row["share"] - 0.3) < 0.1
    plan = make_plan(f"{gate}:{path}@{row['share']}", loaded.decoder)
    with skipping(loaded.model, plan.gate, plan.standin, decoder=loaded.decoder) as run:
        real = loaded.decoder.last_hidden(held.long())
    assert run.skip_ratio == pytest.approx(row["share"], abs=1e-3)
    latch = gate == "cascade"
    with blended(loaded.decoder, trainer.standins, trainer.routers, latch=latch, sinks=4) as control, torch.no_grad():
        control.start(torch.full((16, 1), row["limit"]))
        trained = loaded.decoder.last_hidden(held.long())
    torch.testing.assert_close(real, trained, rtol=1e-3, atol=1e-3)


def test_an_interrupted_run_goes_on(loaded, windows, tmp_path):
    state = tmp_path / "training.pt"
    Trainer(loaded, windows, options(steps=5), state).run()
    again = Trainer(loaded, windows, options(steps=9), state)
    again.run()
    assert again.step == 9
    with pytest.raises(InputError, match="rank was 8, now 6"):
        Trainer(loaded, windows, options(steps=9, rank=6), state).run()


def test_router_by_hand():
    router = Router(4, width=1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        router.bias.fill_(0.5)
        router.inner.copy_(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
        router.outer.fill_(2.0)
    # mean 2.5, variance 1.25: the first entry becomes -1.3416, the last 1.3416; silu(1.3416) = 1.0639
    assert router(torch.tensor([1.0, 2.0, 3.0, 4.0])).item() == pytest.approx(-1.3416 + 0.5 + 2 * 1.0639, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "soft"}, "cannot be distilled"),
        ({"rank_by": "size"}, "is not known"),
        ({"target_skip": 1.5}, "between 0 and 1"),
        ({"steps": None}, "--steps or --minutes"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(UsageError, match=message):
        options(**changes)


def test_a_target_out_of_reach_says_what_can_be(loaded, windows):
    with pytest.raises(UsageError, match=r"at most 0\.33"):
        Trainer(loaded, windows, options(layers=(2, 3), target_skip=0.5))


def test_shares_outside_the_curve_and_foreign_files(loaded, windows, tmp_path):
    trainer = Trainer(loaded, windows, options(steps=2))
    path = tmp_path / "gates.pth"
    write(trainer, path, [{"share": 0.1, "limit": 1.0}, {"share": 0.4, "limit": 0.0}])
    with pytest.raises(UsageError, match=r"0\.10 \.\. 0\.40"):
        make_plan(f"learned:{path}@0.6", loaded.decoder)
    with pytest.raises(UsageError, match="holds gate 'learned'"):
        make_plan(f"cascade:{path}", loaded.decoder)
    other = find_decoder(tiny_model(hidden_size=64))
    with pytest.raises(InputError, match="width 32"):
        make_plan(f"learned:{path}@0.2", other)
