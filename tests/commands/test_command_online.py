"""Adaptive thresholds and deep thinking, reached from the command line: they change what runs, and say so."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def generate(sedac, tiny_folder, collected):
    def call(*args, gate=f"cascade:{collected / 'thresholds.json'}"):
        return sedac(
            "generate", "--model", tiny_folder, "--gate", gate, "--prompt", "the sea was grey and", "--max-new-tokens", 40,
            "--ignore-eos", "--json", *args,
        )  # fmt: skip

    return call


@pytest.fixture
def validate(sedac, tiny_folder, collected, other_text, tmp_path):
    def call(*args):
        return sedac(
            "validate", "--model", tiny_folder, "--dataset", other_text, "--samples", 24, "--max-length", 64,
            "--batch-size", 4, "--data-dir", collected, "--out", tmp_path / "validate.json", "--json", *args,
        )  # fmt: skip

    return call


def test_adaptive_thresholds_hold_their_rates(validate):
    result = validate("--adaptive", "0.5,0.25,0.4", "--calibration-steps", 20)
    assert result.code == 0, result.err
    report = result.json
    assert [row["layer"] for row in report["adaptive"]] == [1, 2, 3]
    for row, target in zip(report["adaptive"], (0.5, 0.25, 0.4), strict=True):
        assert row["target"] == target
        assert row["rate"] == pytest.approx(target, abs=0.05)
        assert row["tokens"] > row["judged"] > 200
    thresholds = [row["threshold"] for row in report["adaptive"]]
    assert report["parameters"]["thresholds"] == thresholds
    # Real tokens taught it, once each; the simulation beside them did not.
    assert report["adaptive"][0]["tokens"] == report["reality"]["tokens"] - 24 * 4
    first = report["adaptive"][0]
    exited = report["reality"]["exit_rates"][1] * report["reality"]["tokens"]
    assert exited == pytest.approx(first["rate"] * first["judged"])


def test_adaptive_generation_reports_where_its_thresholds_ended(generate):
    plain, adaptive = generate(), generate("--adaptive", "0.9", "--calibration-steps", 10)
    assert plain.json["adaptive"] is None
    rows = adaptive.json["adaptive"]
    assert [row["target"] for row in rows] == [0.9] * 3
    assert rows[0]["tokens"] == adaptive.json["prompt_tokens"] + 39 - 4
    assert rows[0]["rate"] > 0 < rows[0]["threshold"]
    assert adaptive.json["skip_ratio"] != plain.json["skip_ratio"]
    assert "layer 1: threshold" in adaptive.err


def test_deep_thinking_in_generate_is_counted_and_paid(generate):
    gate = "always:1"
    shallow, never = generate(gate=gate), generate(gate="never")
    deep = generate("--deep-threshold", 0, "--deep-rounds", 2, gate=gate)
    text = [t["token"] for t in deep.json["tokens"][0]]
    assert text == [t["token"] for t in never.json["tokens"][0]] != [t["token"] for t in shallow.json["tokens"][0]]
    assert deep.json["deep"] == {"tau_high": 0.0, "max_rounds": 2, "tokens": 40, "passes": 41}
    assert "40 of 40 tokens run again, 41 more forward passes" in deep.err
    assert shallow.json["skip_ratio"] == 0.75
    # Decoding: each token once without 3 of 4 MLPs, and once whole.
    assert deep.json["skip_ratio_decode"] == pytest.approx(1 - 1.25)
    assert generate("--deep-threshold", 30, gate=gate).json["skip_ratio"] == 0.75


def test_deep_thinking_in_validate_is_in_every_figure(validate, tmp_path):
    shallow = validate("--gate", "always:1")
    deep = validate("--gate", "always:1", "--deep-threshold", 0)
    assert shallow.json["measures"]["agreement"] < 1.0
    assert shallow.json["deep"] is None
    report = deep.json
    assert report["measures"]["agreement"] == 1.0
    assert report["measures"]["kl"] == pytest.approx(0, abs=1e-6)
    assert report["deep"] == {
        "tau_high": 0.0, "max_rounds": 1, "tokens": report["reality"]["tokens"], "passes": 2.0,
    }  # fmt: skip
    assert report["measures"]["skip_ratio"] == report["reality"]["mlp_skip_ratio"] == pytest.approx(0.75 - 1)
    # A pass that saves what it saved before, and one that saves nothing.
    assert report["reality"]["compute_saved"] == pytest.approx(shallow.json["reality"]["compute_saved"] - 1)
    assert json.loads((tmp_path / "validate.json").read_text())["report"]["deep"] == report["deep"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--adaptive", "0.2,0.6"), "2 exit rates for 3 checkpoints [1, 2, 3]"),
        (("--adaptive", "1.2"), "not between 0 and 1"),
        (("--adaptive", "0.2", "--gate", "always:1"), "'always' has no thresholds to adapt"),
        (("--calibration-steps", 9), "goes with adaptive thresholds"),
        (("--deep-rounds", 2), "above which entropy?"),
    ],
)
def test_what_makes_no_sense_is_refused(validate, args, says):
    result = validate(*args)
    assert (result.code, says in result.err) == (2, True), result.err
