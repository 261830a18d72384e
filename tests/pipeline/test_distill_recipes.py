"""The recipes under trial: what each adds is nothing at first, learns, and is what it says; then two of them side by side."""

from __future__ import annotations

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_python, tiny_model

from sedac_cli.config import TextSpec
from sedac_cli.errors import UsageError
from sedac_cli.pipeline.distill.blend import NEVER
from sedac_cli.pipeline.distill.curve import measure_curve
from sedac_cli.pipeline.distill.run import read_windows
from sedac_cli.pipeline.distill.train import DistillOptions
from sedac_cli.structure import find_decoder

sys.path.append(str(ROOT / "benchmarks"))
import distill_recipes
import recipe_trainers


@pytest.fixture
def loaded():
    model = tiny_model(num_hidden_layers=6)
    return SimpleNamespace(model=model, decoder=find_decoder(model), device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _a_state_in_six_layers(monkeypatch):
    monkeypatch.setattr(recipe_trainers.Layers, "every", 2)


WINDOWS = torch.randint(3, 97, (120, 24), dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def make(spec, loaded, stop=None, **changes):
    settings = {"steps": 6, "batch_size": 6, "rank": 8, "target_skip": 0.3, "layers": (1, 2, 4, 5)} | changes
    return recipe_trainers.make(spec, loaded, WINDOWS, DistillOptions(**settings), stop)


def computed(trainer, control, times=1):
    """The figures of steps in the midst of training, with the last one's gradients."""
    for p in trainer.parameters():
        p.requires_grad_(True)
    for step in range(times):
        trainer.step = step
        for p in trainer.parameters():
            p.grad = None
        figures = trainer.compute(control, 0.5)
    return figures


@pytest.mark.parametrize("spec", ["hidden:0", "layers:0", "sees", "gains"])
def test_what_a_recipe_adds_is_nothing_at_first(loaded, spec):
    base, other = make("base", loaded), make(spec, loaded)
    with base.running() as control:
        expected = computed(base, control)
    with other.running() as control:
        found = computed(other, control)
    assert expected[0] > 0
    assert expected[1] > 0.1
    assert torch.equal(found[:2], expected)


def test_weight_zero_trains_what_today_s_recipe_trains(loaded):
    base, other = make("base", loaded), make("hidden:0", loaded)
    base.run()
    other.run()
    assert other.step == 6
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), other.parameters(), strict=True))
    weighted = make("hidden:10", loaded)
    weighted.run()
    assert not all(torch.equal(a, b) for a, b in zip(base.parameters(), weighted.parameters(), strict=True))


def test_another_seed(loaded):
    assert make("seed", loaded).settings.seed == 1
    assert make("seed:7", loaded, seed=2).options.seed == 9


def test_how_far_apart_by_hand():
    dense = torch.tensor([[0.0, 2.0, 4.0]])
    assert recipe_trainers.squared(dense, dense + torch.tensor([0.0, 0.0, 3.0])).item() == pytest.approx(3.0 / 4.0)


def test_the_states_are_those_of_the_two_passes(loaded):
    trainer = make("layers:1", loaded)
    ids = WINDOWS[:4].long()
    with trainer.form() as control, torch.no_grad():
        control.on = False
        dense = trainer.decoder.last_hidden(ids)
        control.on = True
        control.start(torch.full((4, 1), -NEVER))
        assert trainer.apart(dense, trainer.decoder.last_hidden(ids)) == 0
        control.start(torch.full((4, 1), NEVER / 2))
        gated = trainer.decoder.last_hidden(ids)
        states = loaded.model(ids, output_hidden_states=True).hidden_states
        found = trainer.apart(dense, gated)
        spots = trainer.spots
        assert len(spots) == 2
        assert all(torch.equal(spot.gated, states[layer]) for spot, layer in zip(spots, (2, 4), strict=True))
        parts = [recipe_trainers.squared(spot.dense, spot.gated) for spot in spots]
    assert min(parts) > 0
    assert found == pytest.approx(float(sum(parts) + recipe_trainers.squared(dense, gated)) / 3)


def test_the_term_reaches_the_gradients(loaded):
    for spec in ("hidden:5", "layers:5"):
        gradients = []
        for trainer in (make("base", loaded), make(spec, loaded)):
            with trainer.running() as control:
                figures = computed(trainer, control)
            gradients.append([p.grad for p in trainer.parameters()])
        assert figures[2] > 0
        assert not any(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if b.abs().max() > 0)


def test_routers_see_positions_and_earlier_skips(loaded):
    trainer = make("sees", loaded)
    for router in trainer.routers.values():
        router.sees.data = torch.tensor([0.3, -0.2, 0.1])
    with trainer.form() as control, torch.no_grad():
        control.start(torch.zeros(6, 1))
        loaded.decoder.last_hidden(WINDOWS[:6].long())
        skips = {layer: (blend.score > 0).float() for layer, blend in control.layers.items()}
        facts = {layer: blend.seen[1] for layer, blend in control.layers.items()}
        # Scores from what was seen are the scores of the pass: the limits' gradient goes through them.
        assert torch.equal(control.scores_again(), control.scores())
        blend = control.layers[5]
        plain = trainer.routers[5].router(blend.seen[0])[:, 4:]
    assert 0.1 < torch.stack(list(skips.values())).mean() < 0.9
    none = torch.zeros(6, 24)
    shares = {1: none, 2: skips[1], 4: (skips[1] + skips[2]) / 2, 5: (skips[1] + skips[2] + skips[4]) / 3}
    before = {1: none, 2: skips[1], 4: none, 5: skips[4]}
    for layer, seen in facts.items():
        torch.testing.assert_close(seen[..., 0], torch.arange(24.0).add(1).log().div(8).expand(6, 24))
        torch.testing.assert_close(seen[..., 1], shares[layer])
        torch.testing.assert_close(seen[..., 2], before[layer])
    expected = plain + (facts[5] @ torch.tensor([0.3, -0.2, 0.1]))[:, 4:]
    torch.testing.assert_close(blend.score[:, 4:], expected)


def test_gradients_reach_what_routers_see(loaded):
    trainer = make("sees:0.01", loaded)
    with trainer.running() as control:
        computed(trainer, control, times=2)
    gradients = {layer: router.sees.grad.abs() for layer, router in trainer.routers.items()}
    assert all(found[0] > 0 for found in gradients.values())
    assert all(gradients[layer][1] > 0 for layer in (2, 4, 5))
    assert {layer: bool(found[2] > 0) for layer, found in gradients.items()} == {1: False, 2: True, 4: False, 5: True}
    assert [group["peak"] for group in trainer.groups()] == [3e-4, 2e-3, 0.01]
    assert sum(len(group["params"]) for group in trainer.groups()) == len(trainer.parameters())
    assert trainer.costs()["deciding"] > make("base", loaded).costs()["deciding"]


def test_gains_are_norm_weights_of_the_gated_pass_alone(loaded):
    ids = WINDOWS[:4].long()
    names = [name for name, _ in loaded.model.named_modules()]
    dense = loaded.decoder.last_hidden(ids)
    trainer = make("gains", loaded)
    with trainer.running() as control:
        computed(trainer, control)
    own = [p for gains in trainer.gains.values() for p in gains.parameters()]
    assert len(own) == 2 * 6
    assert all(p.grad.abs().max() > 0 for p in own)
    trainer = make("gains:0.1", loaded)
    trainer.run()
    scaled = copy.deepcopy(loaded.model)
    for layer, gains in trainer.gains.items():
        for name, d in gains.items():
            assert d.abs().max() > 0
            getattr(scaled.model.layers[layer], name).weight.mul_(1 + d.detach())
    with trainer.form() as control, torch.no_grad():
        control.start(torch.full((4, 1), -NEVER))
        torch.testing.assert_close(loaded.decoder.last_hidden(ids), find_decoder(scaled).last_hidden(ids))
        control.on = False
        assert torch.equal(loaded.decoder.last_hidden(ids), dense)
    assert [name for name, _ in loaded.model.named_modules()] == names


@pytest.mark.parametrize("spec", ["base", "layers:0.1", "sees", "gains"])
def test_who_is_told_to_stop_still_has_a_curve(loaded, spec):
    stop = recipe_trainers.Stop()
    trainer = make(spec, loaded, stop, steps=1000)
    real = trainer.compute

    def compute(form, done):
        stop.asked = trainer.step == 3
        return real(form, done)

    trainer.compute = compute
    trainer.run()
    assert trainer.step == 4
    rows = distill_recipes.with_net(measure_curve(trainer, WINDOWS[:16], (0.2, 0.4)), trainer.costs())
    costs = trainer.costs()
    assert [row["net"] for row in rows] == [
        pytest.approx(row["share"] * (1 - costs["standin"]) - costs["deciding"]) for row in rows
    ]
    # an MLP here is 3 matrices of 32 x 48, a stand-in 2 of 32 x 8, a router 6 x 32 + 2 x 32 x 16 operations
    assert costs["standin"] == pytest.approx(16 / 144)
    assert costs["deciding"] == pytest.approx(4 * (1216 + 8 * (spec == "sees")) / (6 * 9216))


def test_time_that_is_up_stops_too():
    assert recipe_trainers.Stop(deadline=0)()
    assert not recipe_trainers.Stop()()


def test_unknown_recipes():
    with pytest.raises(UsageError, match="no recipe 'hiden'"):
        recipe_trainers.parse("hiden:1")
    with pytest.raises(UsageError, match="'x' is not a number"):
        recipe_trainers.parse("hidden:x")
    allowed = distill_recipes.SPEC.fullmatch
    assert all(allowed(name) and allowed(name + ":1e-3") and allowed(name + ":0.5") for name in recipe_trainers.RECIPES)
    assert not any(map(allowed, ("hiden", "hidden:", "hidden:x", "base,seed")))


@pytest.mark.parametrize("samples", [20, 10000])
def test_the_windows_are_those_of_the_command(tiny, text_file, samples):
    text = TextSpec(str(text_file), samples=samples, max_length=32)
    found = distill_recipes.windows_of(text, tiny.tokenizer, at_once=3)
    assert torch.equal(found, read_windows(text, tiny.tokenizer))


def test_between_two_rows_and_outside_of_them():
    low = {"net": 0.2, "ppl_ratio": 1.0, "agreement": 0.9, "kl": 0.1}
    high = {"net": 0.4, "ppl_ratio": 1.2, "agreement": 0.7, "kl": 0.5}
    found = distill_recipes.at_net([high, low], 0.25)
    assert found == pytest.approx({"ppl_ratio": 1.05, "agreement": 0.85, "kl": 0.2})
    assert distill_recipes.at_net([high, low], 0.5) is None
    assert distill_recipes.at_net([], 0.25) is None


def test_side_by_side(tiny_folder, text_file, other_text, tmp_path):
    done = run_python(
        ROOT / "benchmarks" / "distill_recipes.py", "--recipes", "base,sees", "--devices", "0,1", "--steps", 21, "--model",
        tiny_folder, "--train", text_file, "--evaluate", other_text, "--out", tmp_path, "--max-length", 32, "--batch-size", 4,
        "--rank", 4, "--held", 24, "--shares", "0.05,0.28,0.6",
    )  # fmt: skip
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [line.split()[:2] for line in done.out.splitlines()[1:]] == [["base", "21"], ["sees", "21"]]
    for name in ("base", "sees"):
        document = json.loads((tmp_path / f"{name}.json").read_text())
        assert summary["recipes"][name] == document | {"exit": 0}
        assert [row["step"] for row in document["history"]] == [1, 20]
        assert (document["steps"], document["ended_early"]) == (21, False)
        assert len(document["curve"]) == 3
        at = summary["table"][name]["net"]["0.25"]
        assert at == distill_recipes.at_net(document["curve"], 0.25)
    assert summary["recipes"]["base"]["learned"] == {}
    assert summary["recipes"]["sees"]["options"] == summary["recipes"]["base"]["options"]
