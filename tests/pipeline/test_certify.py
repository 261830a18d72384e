"""Certified calibration: the statistics against scipy and by counting broken promises; the whole verb on a tiny model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sedac_cli.errors import UsageError
from sedac_cli.gates.learned import Router
from sedac_cli.pipeline.certify.bounds import (
    binomial_cdf,
    fixed_sequence,
    hoeffding_bentkus,
    needed_sequences,
    p_value,
    relative_entropy,
)
from sedac_cli.pipeline.certify.harm import Harm

DELTA = 0.05


@pytest.mark.parametrize("n", [1, 2, 7, 150, 3000])
@pytest.mark.parametrize("p", [1e-4, 0.02, 0.5, 0.98])
def test_binomial_cdf_is_scipys(n, p):
    stats = pytest.importorskip("scipy.stats")
    for k in sorted({-1, 0, 1, n // 50, n // 2, n - 1, n, n + 3}):
        assert binomial_cdf(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p), rel=1e-9, abs=1e-300)


def test_hoeffding_bentkus_is_the_papers_formula():
    stats = pytest.importorskip("scipy.stats")
    for losses, a in ((np.zeros(40), 0.1), (np.r_[np.ones(3), np.zeros(97)], 0.1), (np.full(200, 0.013), 0.02)):
        n, mean = len(losses), losses.mean()
        h = relative_entropy(min(mean, a), a)
        expected = min(math.exp(-n * h), math.e * stats.binom.cdf(math.ceil(losses.sum() - 1e-12), n, a))
        assert hoeffding_bentkus(losses, a) == pytest.approx(expected)
    assert hoeffding_bentkus(np.full(50, 0.4), 0.1) == 1.0
    assert hoeffding_bentkus(np.zeros(149), 0.02) <= DELTA < hoeffding_bentkus(np.zeros(148), 0.02)


def test_betting_is_the_product_written_out():
    rng = np.random.default_rng(1)
    losses, a = rng.random(30) * 0.2, 0.15
    capital, best, seen = 1.0, 1.0, []
    for i, loss in enumerate(losses):
        variance = 0.25
        if i:
            means = [(0.5 + sum(seen[: k + 1])) / (k + 2) for k in range(i)]
            variance = (0.25 + sum((x - m) ** 2 for x, m in zip(seen, means, strict=True))) / (i + 1)
        bet = min(0.95 / (1 - a), math.sqrt(2 * math.log(1 / DELTA) / (30 * variance)))
        capital *= 1 - bet * (loss - a)
        best = max(best, capital)
        seen.append(loss)
    assert p_value("wsr", losses, a, DELTA) == pytest.approx(1 / best)


@pytest.mark.parametrize("bound", ["wsr", "hb"])
@pytest.mark.parametrize("kind", ["bernoulli", "rare", "beta", "ppl"])
def test_a_promise_is_broken_at_most_as_often_as_delta(bound, kind):
    """Ladders of 6 rungs, the third and later ones just above the limit: certifying any of those breaks the promise."""
    rng = np.random.default_rng(7)
    draws, n = 2000, 200
    limit = {"bernoulli": 0.2, "rare": 0.02, "beta": 0.1, "ppl": 0.52}[kind]
    means = limit * np.array([0.3, 0.6, 1.001, 1.001, 1.01, 1.1]) if kind != "ppl" else limit + np.array(
        [-0.02, -0.01, 1e-4, 1e-4, 1e-3, 1e-2]
    )  # fmt: skip

    def losses(mean: float) -> np.ndarray:
        if kind in ("bernoulli", "rare"):
            return (rng.random(n) < mean).astype(float)
        if kind == "beta":
            return rng.beta(20 * mean, 20 * (1 - mean), n)
        return np.clip(rng.normal(mean, 0.02, n), 0, 1)

    broken = certified = 0
    for _ in range(draws):
        passed = fixed_sequence((lambda m=m: p_value(bound, losses(m), limit, DELTA) for m in means), DELTA)
        broken += passed > 2
        certified += passed > 0
    margin = 3 * math.sqrt(DELTA * (1 - DELTA) / draws)
    assert broken / draws <= DELTA + margin
    if kind != "rare" and not (kind == "ppl" and bound == "hb"):
        assert certified / draws > 0.9, "vacuous: clearly safe candidates with 200 sequences must be certified"


def test_the_betting_test_is_nearly_exact_where_it_can_be():
    """It does break the promise now and then at the limit itself: a test that never did would waste its confidence."""
    rng = np.random.default_rng(3)
    hits = np.mean([p_value("wsr", (rng.random(200) < 0.25).astype(float), 0.25, DELTA) <= DELTA for _ in range(2000)])
    assert 0.01 < hits <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 2000)


def test_betting_needs_far_less_text_than_hoeffding_for_a_tight_ppl():
    harm = Harm("ppl", 1.02)
    need = {bound: needed_sequences(bound, harm.bound, DELTA, harm.harmless) for bound in ("wsr", "hb")}
    assert need["wsr"] < 100
    assert need["hb"] > 20 * need["wsr"]


@pytest.mark.parametrize("bound", ["wsr", "hb"])
@pytest.mark.parametrize("harm", [Harm("agreement", 0.98), Harm("kl", 0.05), Harm("ppl", 1.1)])
def test_needed_sequences_is_the_smallest(bound, harm):
    n = needed_sequences(bound, harm.bound, DELTA, harm.harmless)
    assert p_value(bound, np.full(n, harm.harmless), harm.bound, DELTA) <= DELTA
    assert p_value(bound, np.full(n - 1, harm.harmless), harm.bound, DELTA) > DELTA


def test_fixed_sequence_stops_and_does_not_look_further():
    looked = []

    def test(p: float):
        return lambda: looked.append(p) or p

    assert fixed_sequence([test(0.01), test(0.05), test(0.2), test(0.001)], DELTA) == 2
    assert looked == [0.01, 0.05, 0.2]
    assert fixed_sequence([], DELTA) == 0


def test_losses_by_hand():
    sums = {
        "tokens": np.array([10.0, 5.0, 4.0]),
        "nll_dense": np.array([20.0, 10.0, 8.0]),
        "nll_gated": np.array([21.0, 20.0, np.nan]),
        "agree": np.array([9.0, 5.0, 1.0]),
        "kl": np.array([0.5, 0.0, 40.0]),
    }
    ppl = Harm.parse("ppl=1.02")
    assert ppl.clip == (-0.5, 0.5)
    assert ppl.losses(sums) == pytest.approx([0.6, 1.0, 1.0])
    assert ppl.clipped_above(sums) == 2
    assert ppl.shown(ppl.bound) == pytest.approx(1.02)
    assert ppl.shown(ppl.harmless) == pytest.approx(1.0)
    agreement = Harm.parse("agreement=0.98")
    assert agreement.losses(sums) == pytest.approx([0.1, 0.0, 0.75])
    assert agreement.bound == pytest.approx(0.02)
    kl = Harm.parse("kl=0.05")
    assert kl.losses(sums) == pytest.approx([0.25, 0.0, 1.0])
    assert (kl.bound, kl.clipped_above(sums)) == (pytest.approx(0.25), 1)
    assert agreement.kept(0.98)
    assert not ppl.kept(1.03)


@pytest.mark.parametrize(
    "text", ["ppl=1", "ppl", "agreement=1", "agreement=1.2", "kl=0", "kl=nan", "bleu=3", "ppl=inf"]
)
def test_limits_that_make_no_sense_are_refused(text):
    with pytest.raises(UsageError):
        Harm.parse(text)


@pytest.mark.parametrize("losses", [[1.2], [-0.1], [math.nan]])
def test_losses_outside_the_unit_interval_are_refused(losses):
    with pytest.raises(UsageError):
        p_value("wsr", np.array(losses), 0.1, DELTA)


# The whole verb ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, builtin):
    """A tiny random model in a folder, and a data folder with probes for it."""
    from sedac_cli.config import ModelSpec, TextSpec
    from sedac_cli.pipeline.collect import CollectOptions, collect
    from sedac_cli.pipeline.train_probes import TrainOptions, train_probes
    from tests.conftest import tiny_model

    root = tmp_path_factory.mktemp("certify")
    tiny_model(vocab_size=len(builtin.tokenizer), initializer_range=0.06).save_pretrained(root / "model")
    builtin.tokenizer.save_pretrained(root / "model")
    model, text = ModelSpec(str(root / "model")), TextSpec(samples=24, max_length=24)
    collect(CollectOptions(save_dir=root / "data", layers=(1, 2), target="harm"), model, text)
    train_probes(root / "data", TrainOptions(epochs=1))
    return root


def sedac(capsys, *words) -> tuple[int, dict, str]:
    import json

    from sedac_cli.__main__ import main

    try:
        code = main([str(word) for word in words] + ["--json", "-q"]) or 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out.strip() else {}, captured.err


@pytest.mark.parametrize("gate", ["cascade", "soft", "always:2", "random:0.01", "stability:k=1,min_layer=1,tau=0.99"])
def test_what_is_certified_is_kept_on_other_text(place, tmp_path, capsys, gate):
    from sedac_cli.artifacts.thresholds import Thresholds

    name = gate.partition(":")[0]
    file = tmp_path / "thresholds.json"
    code, report, err = sedac(
        capsys, "calibrate", "--data-dir", place / "data", "--gate", gate, "--max-harm", "kl=0.05", "-n", 16, "--out", file
    )  # fmt: skip
    assert code == 0, err
    assert report["sequences"] == 16
    assert report["text"]["skipped"] == 24, "the collected sequences are not used"
    assert report["chosen"]["value"] < 0.05
    promise = Thresholds.read(file).promise
    assert (promise.kind, promise.confidence, promise.calibration_sequences) == ("certified", 0.95, 16)
    assert promise.bound == pytest.approx(0.25)
    assert all(row["p"] <= DELTA for row in promise.candidates if row["certified"])
    out = tmp_path / "validate.json"
    words = ["validate", "--data-dir", place / "data", "-m", place / "model", "-n", 8, "--max-length", 24, "--out", out]
    code, found, err = sedac(capsys, *words, "--thresholds", file)
    assert code == 0, err
    assert found["promise"]["kept"]
    assert found["promise"]["measured"] == pytest.approx(found["measures"]["kl"], rel=1e-4)
    code, again, err = sedac(capsys, *words, "--gate", f"{name}:{file}")
    assert code == 0, err
    assert again["measures"] == found["measures"], "a file and the spec that names it are one gate"


def test_a_broken_promise_fails_validate(place, tmp_path, capsys):
    from sedac_cli.artifacts.thresholds import Thresholds

    file = tmp_path / "thresholds.json"
    sedac(
        capsys,
        "calibrate",
        "--data-dir",
        place / "data",
        "--gate",
        "always:2",
        "--max-harm",
        "kl=5",
        "-n",
        12,
        "--out",
        file,
    )
    found = Thresholds.read(file)
    found.promise.target["limit"] = 1e-9
    found.write(file)
    words = [
        "validate",
        "--data-dir",
        tmp_path,
        "-m",
        place / "model",
        "-n",
        4,
        "--max-length",
        32,
        "--thresholds",
        file,
    ]
    code, result, err = sedac(capsys, *words)
    assert code == 1
    assert not result["promise"]["kept"]
    assert "promised KL (nats) <= 1e-09" in err


def test_nothing_certified_means_never_skip(place, tmp_path, capsys):
    from sedac_cli.artifacts.thresholds import Thresholds

    file = tmp_path / "thresholds.json"
    words = ["calibrate", "--data-dir", place / "data", "--max-harm", "kl=1e-9", "-n", 16, "--out", file]
    code, report, err = sedac(capsys, *words, "--gate", "cascade")
    assert code == 1
    assert "never skip" in err
    assert report["chosen"] is None
    assert len(report["candidates"]) == 1
    assert Thresholds.read(file).thresholds == [0.0, 0.0]
    assert sedac(capsys, *words, "--gate", "always")[0] == 1
    assert Thresholds.read(file).gate == "never"


def test_too_little_text_says_how_much(place, capsys):
    words = ["calibrate", "--data-dir", place / "data", "--min-agreement", "0.98", "-n", 16]
    code, _, err = sedac(capsys, *words)
    need = needed_sequences("wsr", Harm("agreement", 0.98).bound, 1 - 0.95)
    assert code == 3
    assert f"needs {need}" in err


def test_the_probes_own_text_and_the_calibration_text_are_refused(place, tmp_path, capsys):
    file = tmp_path / "thresholds.json"
    words = ["calibrate", "--data-dir", place / "data", "--gate", "random:0.001", "--max-harm", "kl=0.5", "--out", file]
    words += ["--max-length", 24, "-n", 12, "--dataset", "builtin:books"]
    code, _, err = sedac(capsys, *words)
    assert (code, "of this text is in the calibration text" in err) == (3, True)
    assert sedac(capsys, *words, "--split", "validation")[0] == 0
    code, _, err = sedac(
        capsys,
        "validate",
        "--data-dir",
        place / "data",
        "-m",
        place / "model",
        "-n",
        12,
        "--max-length",
        32,
        "--thresholds",
        file,
    )
    assert (code, str(file) in err) == (3, True)


@pytest.mark.parametrize(
    "words",
    [
        ["--confidence", "0.9"],
        ["--max-harm", "kl=0.1", "--strategy", "balanced"],
        ["--max-harm", "kl=0.1", "--batch-rule", "max"],
        ["--max-harm", "kl=0.1", "--min-agreement", "0.9"],
        ["--max-harm", "kl=0.1", "--confidence", "1"],
        ["--max-harm", "kl=0.1", "--bound", "guess"],
        ["--max-harm", "kl=0.1", "--gate", "cascad"],
        ["--max-harm", "kl=0.1", "--max-length", "16"],
        ["--gate", "soft"],
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(place, capsys, words):
    assert sedac(capsys, "calibrate", "--data-dir", place / "data", *words)[0] == 2


def test_a_gates_file_is_certified_with_its_stand_ins(place, tmp_path, capsys):
    import torch

    from sedac_cli.artifacts.gates_file import GatesFile
    from sedac_cli.models import load_model
    from sedac_cli.runtime.plan import make_plan
    from sedac_cli.standins.lowrank import LowRank

    loaded = load_model(str(place / "model"))
    width = loaded.decoder.hidden_size
    torch.manual_seed(0)
    routers = {layer: Router(width, 0).state_dict() | {"weight": torch.randn(width)} for layer in (1, 2)}
    standins = {layer: {k: v.detach() for k, v in LowRank(width, 4).state_dict().items()} for layer in (1, 2)}
    curve = [{"share": 0.05, "limit": 8.0}, {"share": 0.4, "limit": -4.0}]
    gates = tmp_path / "sedac_gates.pth"
    GatesFile("learned", loaded.identity, 2, routers, standins, curve, {"options": {"target_skip": 0.2}}).write(gates)
    file = tmp_path / "deeper" / "thresholds.json"
    code, report, err = sedac(
        capsys, "calibrate", "--data-dir", place / "data", "--gate", f"learned:{gates}", "--max-harm", "kl=0.5", "-n", 16,
        "--out", file,
    )  # fmt: skip
    assert code == 0, err
    plan = make_plan(f"learned:{file}", loaded.decoder, loaded.identity)
    assert plan.gate.parameters()["threshold"] == pytest.approx(report["chosen"]["limit"])
    assert type(plan.standin).__name__ == "LowRankStandIns"
    gates.write_bytes(gates.read_bytes() + b"x")
    with pytest.raises(Exception, match="not the gates file"):
        make_plan(f"learned:{file}", loaded.decoder, loaded.identity)


def test_the_light_loop_measures_what_evaluate_measures(place):
    from sedac_cli.config import TextSpec
    from sedac_cli.corpus import Corpus
    from sedac_cli.models import load_model
    from sedac_cli.pipeline.certify.run import COLUMNS, measure
    from sedac_cli.pipeline.evaluate import evaluate
    from sedac_cli.runtime.plan import make_plan

    loaded = load_model(str(place / "model"))
    corpus = Corpus(TextSpec(samples=5, max_length=24, pack=False), loaded.tokenizer)
    samples = [sample[: 6 + 3 * number] for number, sample in enumerate(corpus.samples())]
    plans = [make_plan(spec, loaded.decoder) for spec in ("always:1", "never", "always:3")]
    for kind, columns in COLUMNS.items():
        for plan, sums in zip(plans, measure(loaded, plans, samples, kind, 2), strict=True):
            one = type("Samples", (), {"spec": corpus.spec, "batches": lambda self, size: iter([samples])})()
            expected = evaluate(loaded, plan.gate, one, 5).per_sequence()
            for name in ("tokens", "skipped", *columns):
                np.testing.assert_allclose(sums[name], expected[name], rtol=1e-4, atol=1e-4)
