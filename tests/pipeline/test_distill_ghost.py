"""Ghost K and V: the start is exact where it can be, training lowers what it trains, the comparison compares like with like."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from sedac_cli.artifacts.manifest import ModelIdentity
from sedac_cli.config import parse_span
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.base import Guards
from sedac_cli.gates.simple import RandomGate
from sedac_cli.gates.span import SpanGate
from sedac_cli.pipeline.distill import loop
from sedac_cli.pipeline.distill.ghost import GhostOptions, GhostTrainer, capture, ghost_batches, linear_start
from sedac_cli.pipeline.distill.ghost_compare import (
    COPIED,
    FULL,
    LINEAR,
    MLP,
    MLP_TRAINED,
    TRAINED,
    Coded,
    compare,
    equal_layers,
)
from sedac_cli.pipeline.distill.loss import kl_loss
from sedac_cli.runtime.plan import make_plan
from sedac_cli.runtime.skip import skipping
from sedac_cli.standins.ghost import GhostKV
from sedac_cli.structure import find_decoder

LAYERS = (2, 3)
IDENTITY = ModelIdentity(
    ref="test", architecture={}, config_digest="", tokenizer_digest="", dtype="float32", weights_sample=[]
)


@pytest.fixture
def loaded():
    model = tiny_model(num_hidden_layers=6)
    for p in model.parameters():
        if p.dim() >= 2:
            p.mul_(6.0)
    return SimpleNamespace(model=model, decoder=find_decoder(model), device=torch.device("cpu"), identity=IDENTITY)


@pytest.fixture
def windows():
    return torch.randint(3, 97, (60, 16), dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def options(**changes):
    return GhostOptions(**({"layers": LAYERS, "steps": 40, "batch_size": 8, "rank": 8, "gate": "random:0.4"} | changes))


def kl_with(loaded, ghost, ids, away):
    gate = Coded(6)
    gate.away = {LAYERS[0]: away.flatten()}
    with torch.no_grad():
        dense = loaded.decoder.last_hidden(ids)
        with skipping(loaded.model, SpanGate(gate, LAYERS), ghost, decoder=loaded.decoder):
            found = loaded.decoder.last_hidden(ids)
        return float(kl_loss(dense.flatten(0, 1), found.flatten(0, 1), loaded.decoder))


def test_the_first_layer_is_predicted_exactly(loaded, windows):
    """Its K and V are a linear map of the normed state; those of the next one are not."""
    ids = windows.long()
    ghost = linear_start(loaded.decoder, LAYERS, [ids[:40]], rank=0)
    batch = capture(loaded.decoder, LAYERS, ids[40:])
    errors = []
    for layer in LAYERS:
        for found, wanted in zip(ghost(layer, batch.entering), (batch.k[layer], batch.v[layer]), strict=True):
            errors.append(float((found - wanted).norm() / wanted.norm()))
    assert max(errors[:2]) < 0.01
    assert min(errors[2:]) > 0.05


def test_train_epoch_lowers_its_loss_on_other_tokens(loaded, windows):
    ids = windows.long()
    ghost = linear_start(loaded.decoder, LAYERS, [ids[:8]], rank=16)
    before = ghost.losses(capture(loaded.decoder, LAYERS, ids[50:])).sum()
    optimizer = torch.optim.AdamW(ghost.parameters(), lr=2e-3, weight_decay=0.0)
    found = [ghost.train_epoch(ghost_batches(loaded.decoder, LAYERS, ids[:48].split(8)), optimizer) for _ in range(12)]
    assert found[-1].mse + found[-1].cosine < found[0].mse + found[0].cosine
    assert found[0].tokens == 48 * 16
    assert ghost.losses(capture(loaded.decoder, LAYERS, ids[50:])).sum() < before
    assert not any(p.requires_grad for p in ghost.parameters())
    with pytest.raises(InputError, match="no batch"):
        ghost.train_epoch([], optimizer)


def test_training_end_to_end_lowers_the_harm(loaded, windows, monkeypatch):
    monkeypatch.setattr(loop, "WARMUP_STEPS", 5)
    gate = RandomGate(6, 0.4, guards=Guards(sinks=4))
    train = torch.randint(3, 97, (400, 16), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    trainer = GhostTrainer(loaded, train, options(end_to_end=1.0, steps=60, lr=4e-3), gate)
    begun = copy.deepcopy(trainer.ghost)
    stock = loaded.model(windows[:2].long()).logits
    trainer.run()
    ids = windows[48:].long()
    away = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    assert kl_with(loaded, trainer.ghost, ids, away) < 0.97 * kl_with(loaded, begun, ids, away)
    assert torch.equal(loaded.model(windows[:2].long()).logits, stock)
    shares = [row["away"] for row in trainer.history[1:]]
    assert sum(shares) / len(shares) == pytest.approx(0.4 * 12 / 16, abs=0.1)


def test_comparison(loaded, windows):
    gate = RandomGate(6, 0.4, guards=Guards(sinks=2))
    begun = linear_start(loaded.decoder, LAYERS, [windows[:40].long()], rank=4)
    rows = {
        r.way: r
        for r in compare(loaded, windows[40:], [windows[:40].long()], gate, begun, copy.deepcopy(begun), rank=4)
    }
    assert rows[FULL].ppl_ratio == {"following": 1.0, "away": 1.0, "all": 1.0}
    assert rows[FULL].kl["all"] == 0
    assert rows[MLP].flops_saved == pytest.approx(rows[TRAINED].flops_saved, rel=1e-6)
    assert rows[MLP].flops_saved > 0
    assert rows[LINEAR].kl == rows[TRAINED].kl
    assert rows[LINEAR].kl["all"] > 0
    assert len({r.tokens["away"] for r in rows.values()}) == 1
    whole = rows[LINEAR].tokens["all"]
    assert whole == 20 * 15
    assert 0 < rows[LINEAR].tokens["following"] < whole - rows[LINEAR].tokens["away"] + 1


def test_nobody_away_costs_and_saves_nothing(loaded, windows):
    begun = linear_start(loaded.decoder, LAYERS, [windows.long()], rank=4)
    rows = compare(loaded, windows[40:], [windows.long()], RandomGate(6, 0.0), begun, begun)
    assert all(r.kl["all"] == pytest.approx(0, abs=1e-6) for r in rows)
    assert all(r.flops_saved == 0 for r in rows)


def test_equal_cost_by_hand():
    decoder = SimpleNamespace(num_layers=8)
    assert equal_layers(decoder, (3, 4), 25.0, [10.0] * 8) == {3: 1.0, 4: 1.0, 5: 0.5}
    assert equal_layers(decoder, (3, 4), 1000.0, [10.0] * 8) == dict.fromkeys((3, 4, 5, 6, 2), 1.0)


def test_from_the_shell(tmp_path, tiny_folder, text_file, sedac):
    path = tmp_path / "ghost.pth"
    made = sedac("distill", "--model", tiny_folder, "--dataset", text_file, "--max-length", 32, "--samples", 60,
                 "--ghost-kv", "--skip-layers", "1..2", "--gate", "random:0.5", "--steps", 4, "--rival", "--batch-size", 8,
                 "--save", path, "--json", "--quiet")  # fmt: skip
    assert made.code == 0, made.err
    rows = {row["way"]: row for row in made.json["comparison"]}
    assert list(rows) == [FULL, MLP, MLP_TRAINED, COPIED, LINEAR, TRAINED]
    assert rows[MLP]["flops_saved"] == rows[MLP_TRAINED]["flops_saved"] > 0
    assert rows[MLP]["kl"]["all"] != rows[MLP_TRAINED]["kl"]["all"]
    assert not path.with_suffix(".training.pt").exists()
    said = sedac("generate", "--model", tiny_folder, "--gate", f"ghost:{path}@random:0.5", "-p", "the sea", "-p", "a",
                 "--max-new-tokens", 12, "--ignore-eos", "--json", "--quiet")  # fmt: skip
    assert said.code == 0, said.err
    assert 0.1 < said.json["skip_ratio_decode"] < 0.4
    seen = sedac("validate", "--model", tiny_folder, "--gate", f"ghost:{path}", "--dataset", text_file, "--samples", 8,
                 "--max-length", 32, "--data-dir", tmp_path, "--json", "--quiet")  # fmt: skip
    assert seen.code == 0, seen.err
    rates = seen.json["reality"]["skip_rates"]
    assert rates[0] == rates[3] == 0
    assert rates[1] == rates[2] > 0.3
    assert seen.json["parameters"]["who"] == "random"


def test_wrong_use(tmp_path, tiny_folder, sedac, loaded):
    assert parse_span("2..4") == (2, 3, 4)
    assert parse_span("7") == (7,)
    for text in ("4..2", "x", "2..", "-1..3"):
        with pytest.raises(UsageError):
            parse_span(text)
    for changes, message in (
        ({"layers": ()}, "not a run"),
        ({"layers": (0, 1)}, "first layer"),
        ({"end_to_end": 2}, "0 and 1"),
    ):
        with pytest.raises(UsageError, match=message):
            options(**changes)
    result = sedac("distill", "--model", tiny_folder, "--ghost-kv")
    assert (result.code, "go together" in result.err) == (2, True)
    path = tmp_path / "ghost.pth"
    ghost = linear_start(loaded.decoder, LAYERS, [torch.arange(48).view(2, 24)], rank=2)
    ghost.save(path, IDENTITY)
    with pytest.raises(UsageError, match="who skips"):
        make_plan(f"ghost:{path}", loaded.decoder)
    with pytest.raises(UsageError, match="need a file"):
        make_plan("ghost:", loaded.decoder)
    with pytest.raises(InputError, match="layers up to 3"):
        make_plan(f"ghost:{path}@random:0.1", find_decoder(tiny_model(num_hidden_layers=3)))
    assert math.isclose(make_plan(f"ghost:{path}@random:0.1", loaded.decoder).gate.inner.probability, 0.1)
    assert isinstance(make_plan(f"ghost:{path}@never", loaded.decoder).standin, GhostKV)
