"""Mean and spread of the lens entropy: measured over what the gate may skip, on the user's own text."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sedac_cli.artifacts.manifest import Manifest
from sedac_cli.artifacts.thresholds import Thresholds
from sedac_cli.errors import InputError
from sedac_cli.gates.lens import HeadLens
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.pipeline.lens import collected_batches, measure_lens

SPEC = "entropy:threshold=0.1,anchor_interval=0,min_exit_layer=1"


def by_hand(loaded, sequences, layer, sinks):
    """Entropies of norm and head over hidden_states[layer], one sequence at a time."""
    found = []
    for ids in (ids for ids in sequences if len(ids) > sinks):
        states = loaded.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, sinks:]
        logits = loaded.model.lm_head(loaded.model.model.norm(states)).double()
        found.append(torch.distributions.Categorical(logits=logits).entropy() / math.log(2))
    return torch.cat(found)


def test_measured_are_the_tokens_a_gate_may_skip(tiny):
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 200, (n,), generator=generator).tolist() for n in (9, 3, 14, 6, 2)]
    found = measure_lens(tiny.decoder, HeadLens(tiny.decoder), [1, 3], [sequences[:3], sequences[3:]], sinks=4)
    assert found.tokens == 5 + 10 + 2
    for layer in (1, 3):
        bits = by_hand(tiny, sequences, layer, 4)
        assert found.mean[layer] == pytest.approx(bits.mean().item(), rel=1e-5)
        assert found.sd[layer] == pytest.approx(bits.std().item(), rel=1e-4)
    assert found.mean[1] != pytest.approx(found.mean[3], rel=3e-5)


def test_too_little_text(tiny):
    with pytest.raises(InputError, match="1 tokens to measure"):
        measure_lens(tiny.decoder, HeadLens(tiny.decoder), [1], [[[5, 6, 7, 8, 9]]], sinks=4)


def test_calibrate_measures_on_what_was_collected(sedac, tiny, copied):
    result = sedac("calibrate", "--data-dir", copied, "--gate", SPEC, "--json")
    assert result.code == 0, result.err
    written = Thresholds.read(copied / "thresholds.json")
    assert (written.gate, written.promise.kind, written.guards.sinks) == ("entropy", "none", 4)
    # The gate's own guards: the first two layers and the last one are never skipped, but 1 may be looked at.
    assert (written.guards.first, written.guards.last, written.parameters["checks"]) == (2, 1, [1, 2])
    data = CollectedData.open(copied)
    sequences = [ids for batch in collected_batches(data) for ids in batch]
    assert sum(map(len, sequences)) == data.tokens
    bits = by_hand(tiny, sequences, 2, 4)
    assert written.parameters["mean"][1] == pytest.approx(bits.mean().item(), rel=1e-5)
    assert written.parameters["sd"][1] == pytest.approx(bits.std().item(), rel=1e-4)
    assert result.json["layers"][1] == {
        "layer": 2, "mean": written.parameters["mean"][1], "sd": written.parameters["sd"][1],
    }  # fmt: skip
    Manifest.read(copied).verify(copied, "calibrate")
    assert result.json["tokens"] == written.found_by["tokens"] == len(bits)


def test_the_file_is_a_gate(sedac, tiny_folder, text_file, other_text, tmp_path):
    path = tmp_path / "entropy.json"
    text = ("--samples", 8, "--max-length", 64)
    measured = sedac(
        "calibrate", "--model", tiny_folder, "--data-dir", tmp_path, "--dataset", text_file, *text, "--gate", SPEC,
        "--out", path,
    )  # fmt: skip
    assert measured.code == 0, measured.err
    assert "lens entropy on 480 tokens" in measured.out
    common = ("--model", tiny_folder, "--data-dir", tmp_path, "--dataset", other_text, *text, "--json")
    from_file = sedac("validate", *common, "--gate", f"entropy:{path}").json
    numbers = json.loads(path.read_text())["parameters"]
    mean, sd = ("/".join(map(repr, numbers[name])) for name in ("mean", "sd"))
    typed = sedac("validate", *common, "--gate", f"{SPEC},mean={mean},sd={sd}").json
    assert from_file["measures"] == typed["measures"]
    assert 0 < from_file["measures"]["skip_ratio"] < 0.5


def test_certifying_measures_first_and_each_setting_keeps_its_own_checks(sedac, tiny, copied, text_file):
    result = sedac(
        "calibrate", "--data-dir", copied, "--gate", "entropy:anchor_interval=0,min_exit_layer=1,first=0,last=0",
        "--max-harm", "kl=8", "--confidence", 0.6, "--dataset", text_file, "--samples", 24, "--max-length", 64,
        "--allow-overlap", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    written = Thresholds.read(copied / "thresholds.json")
    sequences = [ids for batch in collected_batches(CollectedData.open(copied)) for ids in batch]
    limit = written.parameters["threshold"]
    checks = [layer for layer in (1, 2, 3) if 1.2 * layer / 4 > limit]
    assert written.parameters["checks"] == checks
    for index, layer in enumerate(checks):
        bits = by_hand(tiny, sequences, layer, 4)
        assert written.parameters["mean"][index] == pytest.approx(bits.mean().item(), rel=1e-5)
    assert result.json["rungs"] == 20


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--gate", "entropy:mean=5"), 2, "are what is measured here"),
        (("--gate", "entropy", "--strategy", "balanced"), 2, "gate 'entropy' is measured"),
        (("--gate", "entropy:treshold=0.5"), 2, "Did you mean 'threshold'?"),
        (("--gate", "entropy:min_exit_layer=4"), 3, "checks no layer of this model of 4 layers"),
        (("--gate", "entropy:mean=5", "--max-harm", "kl=5", "--confidence", 0.6), 2, "needs sd too"),
    ],
)
def test_what_cannot_be_measured_is_said(sedac, copied, args, code, says):
    result = sedac("calibrate", "--data-dir", copied, *args)
    assert (result.code, says in result.err) == (code, True), result.err


def test_no_text_at_all(sedac, tiny_folder, tmp_path):
    result = sedac("calibrate", "--data-dir", tmp_path, "--model", tiny_folder, "--gate", "entropy")
    assert (result.code, "no text" in result.err) == (2, True)
