"""vLLM with a gate gives what the Hugging Face runtime gives with the same gate: same tokens, same skips, same log-probabilities."""

from __future__ import annotations

import pytest
import torch
from vllm_helpers import PROMPTS, hugging_face, save_gates, save_probes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def assert_same(got, expected, tolerance=2e-3):
    (new, logprobs), (their_new, their_logprobs) = got[:2], expected[:2]
    assert new == their_new
    for mine, theirs in zip(logprobs, their_logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=tolerance)


def compare(engine, loaded, spec, **settings):
    from sedac_cli.vllm.plan import ModelShape, build_plan

    session = engine.gate(spec, **settings)
    got = engine.run()
    plan = build_plan(session.settings, ModelShape.of(engine.worker.model_config))
    expected = hugging_face(loaded, plan)
    assert_same(got, expected)
    assert session.counters.skipped.tolist() == expected[2].skipped_per_layer
    return session, expected[2]


def test_dense_is_what_hugging_face_computes(family):
    engine, loaded = family
    from sedac_cli.gates.simple import NeverGate
    from sedac_cli.runtime.plan import Plan
    from sedac_cli.standins import ZeroStandIn

    engine.gate(None)
    assert_same(engine.run(), hugging_face(loaded, Plan(NeverGate(4), ZeroStandIn())))


def test_never_is_plain_vllm_bit_for_bit(family):
    engine, _ = family
    engine.gate(None)
    plain = engine.run()
    engine.gate("never")
    assert engine.run() == plain


@pytest.mark.parametrize("spec", ["always:2", "always:0", "forced:1/3", "stability:tau=0.3,k=1,min_layer=1,sinks=2"])
def test_gates_without_artifacts(family, spec):
    engine, loaded = family
    session, run = compare(engine, loaded, spec)
    assert 0 < run.skip_ratio <= 1
    assert session.status()["skip_ratio"] == pytest.approx(run.skip_ratio)


@pytest.mark.parametrize("settings", [{}, {"sinks": 4}, {"phase": "decode"}, {"phase": "prefill", "protect_last": 1}])
def test_cascade_with_guards(family, tmp_path, settings):
    engine, loaded = family
    thresholds = save_probes(tmp_path, loaded, PROMPTS, layers=(1, 2), share=0.4)
    settings = {
        "probe_dir": str(tmp_path),
        "probe_layers": [1, 2],
        "adaptive": False,
        "thresholds": thresholds,
    } | settings
    session, run = compare(engine, loaded, None, **settings)
    assert 0.02 < run.skip_ratio < 0.9
    assert sum(session.counters.exits.tolist()) > 0


def test_adaptive_cascade_exits_after_its_warm_up(family, tmp_path):
    engine, loaded = family
    save_probes(tmp_path, loaded, PROMPTS, layers=(1, 2), share=0.4)
    session = engine.gate(
        None, probe_dir=str(tmp_path), probe_layers=[1, 2], exit_rates=[0.3, 0.5], calibration_steps=20
    )
    engine.run(PROMPTS * 4, tokens=16)
    status = session.status()
    assert 0.05 < status["skip_ratio"] < 0.8
    assert all(value > 0 for value in status["parameters"]["thresholds"])


def test_learned_with_standins(family, tmp_path):
    engine, loaded = family
    save_gates(tmp_path / "gates.pth", loaded)
    session, run = compare(engine, loaded, f"learned:{tmp_path}/gates.pth@0.4")
    assert session.status()["standin"] == "LowRankStandIns"
    assert 0.05 < run.skip_ratio < 0.95


def test_soft_blends(family, tmp_path):
    engine, loaded = family
    thresholds = save_probes(tmp_path, loaded, PROMPTS, layers=(1, 2), share=0.4, gate="soft")
    _, run = compare(engine, loaded, f"soft:{tmp_path}/thresholds.json")
    assert thresholds
    assert run.skip_ratio < 1
