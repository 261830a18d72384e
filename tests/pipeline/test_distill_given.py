"""Stand-ins for a gate that stays as it is: they beat nothing under the same choices, and the file is that gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sedac_cli.artifacts.gates_file import GatesFile
from sedac_cli.config import TextSpec
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.registry import build_gate
from sedac_cli.pipeline.distill import loop
from sedac_cli.pipeline.distill.given import GivenOptions, GivenTrainer
from sedac_cli.pipeline.distill.given_run import LINEAR, TRAINED, ZERO, distill_given, read_gate
from sedac_cli.runtime.plan import make_plan
from sedac_cli.runtime.skip import skipping
from sedac_cli.standins import ZeroStandIn


@pytest.fixture
def gates(collected, tmp_path) -> dict[str, str]:
    """Each kind of gate, as a spec, on the tiny model; those with probes in files made of one calibration."""
    collected = Path(shutil.copytree(collected, tmp_path / "collected"))
    document = json.loads((collected / "thresholds.json").read_text())
    specs = {"stability": "stability:tau=0.6,k=1,min_layer=2,sinks=1"}
    for name, layers in (("cascade", [1, 2, 3]), ("soft", [1, 2, 3]), ("fixed", [2])):
        mine = document | {"gate": name, "layers": layers, "thresholds": [], "probes": {}}
        for layer in layers:
            mine["thresholds"].append(
                (4.0 if name == "soft" else 1.3) * document["thresholds"][document["layers"].index(layer)]
            )
            mine["probes"][layer] = document["probes"][str(layer)]
        mine["parameters"] = {"decay": 0.7} if name == "soft" else {}
        path = collected / f"{name}-given.json"
        path.write_text(json.dumps(mine))
        specs[name] = f"{name}:{path}"
    return specs


def made(tiny, text_file, spec, path, **changes):
    options = GivenOptions(**({"gate": spec, "steps": 30, "batch_size": 8, "rank": 8, "lr": 3e-3} | changes))
    return distill_given(tiny, TextSpec(str(text_file), samples=150, max_length=32), options, path)


@pytest.mark.parametrize("name", ["cascade", "soft", "fixed", "stability"])
def test_trained_beats_the_start_beats_nothing_and_the_file_is_the_gate(
    name, gates, tiny, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "WARMUP_STEPS", 5)
    path = tmp_path / "gates.pth"
    stock = tiny.model(torch.arange(30)[None]).logits
    report = made(tiny, text_file, gates[name], path)
    assert torch.equal(tiny.model(torch.arange(30)[None]).logits, stock)
    kl = {way: row["kl"] for way, row in report.ways.items()}
    assert kl[TRAINED] < 0.97 * kl[LINEAR]
    assert kl[TRAINED] < 0.8 * kl[ZERO]
    assert 0.02 < report.ways[TRAINED]["share"] < 0.8

    plan = make_plan(f"{name}:{path}", tiny.decoder, tiny.identity)
    before = build_gate(gates[name], tiny.decoder)
    assert plan.gate.parameters() == before.parameters()
    assert (plan.gate.guards, plan.gate.name) == (before.guards, name)
    ids = torch.randint(3, 200, (6, 32), generator=torch.Generator().manual_seed(1))
    runs = []
    with torch.no_grad():
        for gate, standin in ((plan.gate, plan.standin), (before, plan.standin), (before, ZeroStandIn())):
            with skipping(tiny.model, gate, standin, decoder=tiny.decoder, keep_passes=True) as run:
                runs.append((tiny.decoder.last_hidden(ids), run.passes[0].exit_layer))
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.allclose(runs[0][0], runs[2][0], atol=1e-3)


def test_the_loss_is_taken_in_the_form_that_runs(gates, tiny, text_file):
    """Soft blends pass gradients through the stand-in and leave the model's own weights alone."""
    gate, _ = read_gate(gates["soft"], tiny)
    windows = torch.randint(3, 200, (40, 32), dtype=torch.int32)
    trainer = GivenTrainer(tiny, windows, GivenOptions(gate="soft", steps=2, batch_size=4, rank=4), gate)
    for p in trainer.parameters():
        p.requires_grad_(True)
    with trainer.running() as run:
        loss, skipped = trainer.compute(run, 0.0).tolist()
    assert loss > 0
    assert 0 < skipped < 1
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in trainer.standins[3].parameters())
    assert all(p.grad is None for p in tiny.model.parameters())


def test_text_stands_for_the_phase_the_gate_acts_in(gates, tiny, text_file, tmp_path):
    path = Path(gates["fixed"].partition(":")[2])
    document = json.loads(path.read_text())
    document["guards"]["prefill"] = False
    path.write_text(json.dumps(document))
    report = made(tiny, text_file, gates["fixed"], tmp_path / "gates.pth", steps=1)
    assert report.ways[TRAINED]["share"] > 0.02
    assert make_plan(f"fixed:{tmp_path / 'gates.pth'}", tiny.decoder).gate.guards.prefill is False


def test_calibrate_and_validate_take_the_file(gates, tiny_folder, tiny, text_file, other_text, tmp_path, sedac):
    path = tmp_path / "gates.pth"
    made(tiny, text_file, gates["stability"], path, steps=2)
    model = ["--model", tiny_folder, "--max-length", 32, "--data-dir", tmp_path, "--quiet", "--json"]
    seen = sedac("validate", *model, "--gate", f"stability:{path}", "--dataset", other_text, "--samples", 10)
    assert seen.code == 0, seen.err
    assert seen.json["parameters"]["tau"] == 0.6
    limits = tmp_path / "thresholds.json"
    found = sedac("calibrate", *model, "--gate", f"stability:{path}", "--dataset", other_text, "--samples", 40,
                  "--max-harm", "agreement=0.2", "--out", limits)  # fmt: skip
    assert found.code == 0, found.err
    told = json.loads(limits.read_text())
    assert set(told["parameters"]) == {"tau"}
    assert told["gates_file"]["file"] == "gates.pth"
    plan = make_plan(f"stability:{limits}", tiny.decoder, tiny.identity)
    assert plan.gate.parameters() == {"tau": told["parameters"]["tau"], "k": 1, "min_layer": 2}
    assert plan.standin.cost_per_token(3) > 0


def test_probe_gates_are_tightened_by_a_factor(gates, tiny, text_file, tmp_path):
    from sedac_cli.gates.base import Guards
    from sedac_cli.pipeline.certify.ladder import Site, make_ladder
    from sedac_cli.runtime.plan import plan_from_thresholds

    path = tmp_path / "gates.pth"
    made(tiny, text_file, gates["cascade"], path, steps=1)
    ladder = make_ladder(f"cascade:{path}", Site(tiny.decoder, tiny.identity, Guards(sinks=4), tmp_path, tmp_path))
    factors = [rung.setting["tighten"] for rung in ladder.rungs]
    assert factors == sorted(factors)
    own = build_gate(gates["cascade"], tiny.decoder)
    half = next(rung for rung in ladder.rungs if rung.setting["tighten"] == 0.5)
    plan = plan_from_thresholds(half.thresholds, tmp_path, tiny.decoder, tiny.identity)
    assert plan.gate.thresholds == pytest.approx({layer: t / 2 for layer, t in own.thresholds.items()})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope", "there is no gate 'nope'"),
        ("soft", "needs an argument"),
        ("never", "skips nothing"),
        ("stability:tau=2", "out of range"),
        ("cascade:gates.pth@0.2", "stand-ins already"),
        ("fixed:{cascade}", "is for gate 'cascade'"),
        ("stability:tau=1,min_layer=2", "skips nothing on this text"),
    ],
)
def test_wrong_gates(spec, message, gates, tiny, text_file, tmp_path):
    with pytest.raises(UsageError, match=message):
        made(tiny, text_file, spec.format(cascade=gates["cascade"].partition(":")[2]), tmp_path / "gates.pth")


def test_no_share_and_no_other_model(gates, tiny, text_file, tmp_path):
    path = tmp_path / "gates.pth"
    made(tiny, text_file, gates["fixed"], path, steps=1)
    with pytest.raises(UsageError, match="own thresholds decide"):
        make_plan(f"fixed:{path}@0.3", tiny.decoder)
    with pytest.raises(UsageError, match="holds gate 'fixed'"):
        make_plan(f"cascade:{path}", tiny.decoder)
    other = tiny.identity.model_copy(update={"architecture": tiny.identity.architecture | {"hidden_size": 64}})
    with pytest.raises(InputError, match="hidden_size is 32 there"):
        make_plan(f"fixed:{path}", tiny.decoder, other)
    assert GatesFile.read(path).decided_by["gate"] == "fixed"
