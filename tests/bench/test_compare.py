"""`bench compare`: a real change is seen, noise is called noise, and how often it is wrong is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sedac_cli.bench.compare import compare_documents

PAIRS = 8


def document(rng, slow=1.0, spread=0.05, pairs=PAIRS, harm=0.1, name="gate", sequences=20, text=0):
    """A run in which own takes `slow` seconds where dense takes one."""

    def sample(seconds):
        return {"seconds": seconds, "prefill_seconds": seconds / 4, "decode_seconds": seconds * 3 / 4, "prompt_tokens": 100,
                "new_tokens": 20, "sequences": 1, "ttft": [seconds / 4], "itl": [seconds / 30], "peak_bytes": 1000}  # fmt: skip

    def noisy(scale):
        return [sample(scale * float(np.exp(rng.normal(0, spread)))) for _ in range(pairs)]

    of_text = np.random.default_rng(text)
    base, hurt = of_text.normal(3, 0.3, size=sequences), of_text.lognormal(0, 1, size=sequences)
    each = {"tokens": [64.0] * sequences, "nll_dense": (64 * base).tolist(), "nll_gated": (64 * (base + harm * hurt)).tolist(),
            "agree": [50.0] * sequences}  # fmt: skip
    cell = {"label": "batch 1", "samples": {"own": noisy(slow), "dense": noisy(1.0)}}
    return {"schema_version": 1, "kind": "sedac bench", "versions": {"torch": "1"}, "machine": {"cpu": "c", "busy_before": rng.random()},
            "subject": {}, "backend": "hf", "baseline": "b", "workload": "w", "seed": 0,
            "configurations": [{"name": name, "cells": [cell], "quality": {"per_sequence": each}}]}  # fmt: skip


def verdicts(a, b, **more):
    return {c.figure: c.verdict for c in compare_documents(a, b, **more).changes}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_slower_run_is_worse_and_a_faster_one_better(rng):
    worse = verdicts(document(rng), document(rng, slow=1.3))
    assert {worse[f] for f in ("speed-up", "tokens/s", "decode tokens/s", "TTFT, ms", "ITL, ms")} == {"worse"}
    better = verdicts(document(rng), document(rng, slow=0.7))
    assert {better[f] for f in ("speed-up", "tokens/s", "TTFT, ms")} == {"better"}
    assert better["peak memory, MiB"] == "noise"


def test_the_same_twice_is_noise(rng):
    """At 99 % few of many comparisons may be wrong; bootstraps of few samples are a little narrow."""
    found = [verdicts(document(rng), document(rng))["speed-up"] for _ in range(100)]
    assert found.count("noise") >= 93


def test_a_change_too_small_to_matter_is_noise(rng):
    a, b = document(rng, spread=1e-5), document(rng, slow=1.01, spread=1e-5)
    assert verdicts(a, b)["speed-up"] == "noise"
    assert verdicts(a, b, min_change=0.005)["speed-up"] == "worse"


def test_few_samples_have_no_verdict(rng):
    assert verdicts(document(rng, pairs=3), document(rng, pairs=3, slow=3.0))["speed-up"] == "too few samples"


def test_quality_is_compared_sequence_by_sequence(rng):
    """Sequences differ far more in what skipping does to them than the gates differ: only pairs show it."""
    assert verdicts(document(rng), document(rng, harm=0.15))["ppl ratio"] == "worse"
    assert verdicts(document(rng), document(rng, harm=0.05))["ppl ratio"] == "better"
    assert verdicts(document(rng), document(rng))["ppl ratio"] == "noise"


def test_what_is_not_the_same_is_said(rng):
    a, b = document(rng), document(rng, text=1) | {"versions": {"torch": "2"}, "seed": 1}
    b["configurations"].append({"name": "new", "cells": [], "quality": None})
    found = compare_documents(a, b)
    assert found.environment == ["torch: 1 before, 2 after", "seed: 0 before, 1 after"]
    assert found.only_in_one == ["only in the later run: new"]
    assert {c.where for c in found.changes} == {"batch 1", "quality, other text"}


def test_from_the_command_line(sedac, rng, tmp_path):
    for name, slow in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.json").write_text(json.dumps(document(rng, slow=slow)))
    a, b = tmp_path / "a", tmp_path / "b" / "bench.json"
    result = sedac("bench", "compare", a, b)
    assert (result.code, "worse" in result.out) == (0, True)
    result = sedac("bench", "compare", a, b, "--fail-on-regression")
    assert (result.code, "gate speed-up" in result.err) == (1, True)
    assert sedac("bench", "compare", b, a, "--fail-on-regression", "--json").json["changes"][0]["verdict"] == "better"
    (tmp_path / "c.json").write_text("{}")
    assert sedac("bench", "compare", a, tmp_path / "c.json").code == 3
    (tmp_path / "c.json").write_text(json.dumps(document(rng) | {"schema_version": 9}))
    assert "schema version 9" in sedac("bench", "compare", a, tmp_path / "c.json").err
    (tmp_path / "c.json").write_text(json.dumps(document(rng, name="other")))
    assert "no configuration in common" in sedac("bench", "compare", a, tmp_path / "c.json").err


def drafting(document, accepted):
    samples = document["configurations"][0]["cells"][0]["samples"]["own"]
    for sample, count in zip(samples, accepted, strict=True):
        sample["drafts"] = {"accepted": count, "proposed": 20, "verify_tokens": 25}
    return document


def test_drafts_that_are_accepted_less_often(rng):
    a, b = drafting(document(rng), [15, 16] * 4), drafting(document(rng), [9, 10] * 4)
    found = {c.figure: c for c in compare_documents(a, b).changes}
    assert (found["AR"].before, found["AR"].after) == (15.5 / 20, 9.5 / 20)
    assert (found["AR"].verdict, found["TRR"].verdict) == ("worse", "worse")
    found = compare_documents(drafting(a, [0] * 8), b)
    assert "no ratio: gate, batch 1: AR was 0 and is 0.475" in found.only_in_one
    json.dumps([c.ratio for c in found.changes], allow_nan=False)


def with_task(document, right, kind="acc,none"):
    rows = [{"doc": i, "gated": {kind: float(i in right)}} for i in range(200)]
    score = {"own": len(right) / 200, "higher_is_better": True}
    document["configurations"][0]["quality"]["tasks"] = {"arc": {"metrics": {kind: score}, "samples": {"arc": rows}}}
    return document


def test_scores_of_tasks_document_by_document(rng):
    a = with_task(document(rng), set(range(160)))
    (found,) = [c for c in compare_documents(a, with_task(document(rng), set(range(120)))).changes if c.where == "arc"]
    assert (found.figure, found.before, found.after, found.verdict) == ("acc,none", 0.8, 0.6, "worse")
    (found,) = [
        c for c in compare_documents(a, with_task(document(rng), {*range(158), 170, 171})).changes if c.where == "arc"
    ]
    assert found.verdict == "noise"
    odd = with_task(document(rng), set(range(120)))
    odd["configurations"][0]["quality"]["tasks"]["arc"]["samples"]["arc"][0]["gated"]["acc,none"] = [1, 2]
    (found,) = [c for c in compare_documents(a, odd).changes if c.where == "arc"]
    assert (found.verdict, found.low) == ("too few samples", None)
