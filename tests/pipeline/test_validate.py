"""What `validate` reports is what an independent masked model does, on text the gate has not seen."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import save_tiny, tiny_tokenizer, words
from transformers import AutoModelForCausalLM

from sedac_cli.artifacts.thresholds import Thresholds
from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError
from sedac_cli.gates.base import Guards
from sedac_cli.gates.registry import build_gate, gate_from_thresholds
from sedac_cli.gates.simple import AlwaysGate
from sedac_cli.models import load_model
from sedac_cli.pipeline.calibrate import CalibrateOptions, calibrate
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.pipeline.validate import ValidateOptions, validate, write_validation
from sedac_cli.probes import load_probe


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Short documents of uneven length: every batch is padded."""
    path = tmp_path_factory.mktemp("text") / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": words(2 + n * n % 11, 5000 + n)}) for n in range(30)))
    return path


@pytest.fixture
def uneven(lines):
    return TextSpec(str(lines), samples=24, max_length=40, pack=False)


@pytest.fixture
def gate(collected, tiny):
    return gate_from_thresholds(Thresholds.read(collected / "thresholds.json"), collected, tiny.decoder)


class Masked:
    """An independent way to skip: every MLP is computed in full, and rows of tokens that have left are made zero."""

    def __init__(self, folder, thresholds: Thresholds, data):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.limits = thresholds.by_layer
        self.probes = {x: load_probe(data / f"sedac_probe_layer{x}.pth") for x in self.limits}
        self.on = False
        for index, layer in enumerate(self.model.model.layers):
            layer.register_forward_pre_hook(self.look(index), with_kwargs=True)
            layer.mlp.register_forward_hook(self.cut(index))

    def look(self, index):
        def hook(module, args, kwargs):
            hidden = (args[0] if args else kwargs["hidden_states"])[0]
            if index == 0:
                self.left = torch.zeros(hidden.shape[0], dtype=torch.bool)
                self.skipped = torch.zeros(hidden.shape[0])
            if index in self.limits:
                fires = self.probes[index](hidden) < self.limits[index]
                fires[:4] = False
                self.left |= fires

        return hook

    def cut(self, index):
        def hook(module, args, output):
            if self.on:
                self.skipped += self.left
                return output * (~self.left).float().view(1, -1, 1)

        return hook

    @torch.no_grad()
    def run(self, ids: list[int], on: bool):
        self.on = on
        logits = self.model(torch.tensor([ids])).logits[0].double()
        return torch.log_softmax(logits, dim=-1), self.skipped.clone()


def brute_force(masked: Masked, samples: list[list[int]]) -> dict[str, float]:
    nll_dense, nll_gated, agree, kl, skipped, everything = [], [], [], [], [], []
    for ids in samples:
        dense, _ = masked.run(ids, on=False)
        gated, counts = masked.run(ids, on=True)
        target = torch.tensor(ids[1:])
        rows = torch.arange(len(target))
        nll_dense.append(-dense[rows, target])
        nll_gated.append(-gated[rows, target])
        agree.append((dense.argmax(-1) == gated.argmax(-1))[:-1].double())
        kl.append((dense.exp() * (dense - gated)).sum(-1)[:-1])
        skipped.append(counts[:-1])
        everything.append(counts)
    d, g = torch.cat(nll_dense).mean(), torch.cat(nll_gated).mean()
    return {
        "ppl_dense": math.exp(d), "ppl_gated": math.exp(g), "ppl_ratio": math.exp(g - d),
        "agreement": torch.cat(agree).mean().item(), "kl": torch.cat(kl).mean().item(),
        "skip_ratio": torch.cat(skipped).mean().item() / 4, "all": torch.cat(everything).mean().item() / 4,
        "tokens": len(torch.cat(agree)),
    }  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 7])
def test_figures_equal_a_masked_model_in_float64(tiny, tiny_folder, collected, gate, uneven, batch_size):
    samples = list(Corpus(uneven, tiny_tokenizer()).samples())
    expected = brute_force(Masked(tiny_folder, Thresholds.read(collected / "thresholds.json"), collected), samples)
    report, _ = validate(tiny, gate, uneven, ValidateOptions(batch_size))
    assert report.predicted_tokens == expected["tokens"] == sum(len(s) - 1 for s in samples)
    assert report.sequences == len(samples)
    assert 0.05 < expected["skip_ratio"] < 0.95
    assert expected["agreement"] < 0.99
    for name in ("ppl_dense", "ppl_gated", "ppl_ratio", "kl"):
        assert report.measures[name] == pytest.approx(expected[name], rel=1e-3), name
    for name in ("agreement", "skip_ratio"):
        assert report.measures[name] == pytest.approx(expected[name], abs=2e-3), name
    assert report.reality.mlp_skip_ratio == pytest.approx(expected["all"], abs=2e-3)
    assert report.reality.tokens == sum(map(len, samples))


def test_never_changes_nothing(tiny, uneven):
    report, _ = validate(tiny, build_gate("never", tiny.decoder), uneven, ValidateOptions(5))
    m = report.measures
    assert (m["ppl_ratio"], m["agreement"], m["kl"], m["skip_ratio"]) == (1.0, 1.0, 0.0, 0.0)
    assert m["ppl_dense"] == m["ppl_gated"]
    assert report.intervals["ppl_ratio"] == (1.0, 1.0)
    for way in (report.reality, report.simulation):
        assert (way.mlp_skip_ratio, way.compute_saved, way.theoretical_speedup, way.average_exit_layer) == (0, 0, 1, 4)


def test_bins_raw_samples_and_intervals_belong_together(tiny, gate, uneven, tmp_path):
    report, evaluation = validate(tiny, gate, uneven, ValidateOptions(5))
    assert set(report.bins) == {"target frequency", "dense entropy"}
    for bins in report.bins.values():
        assert sum(b["tokens"] for b in bins) == report.predicted_tokens
        assert len(bins) > 1
        mean = sum(b["tokens"] * b["agreement"] for b in bins) / report.predicted_tokens
        assert mean == pytest.approx(report.measures["agreement"])
    for name, (low, high) in report.intervals.items():
        assert low <= report.measures[name] <= high, name
        assert low < high
    write_validation(tmp_path / "v.json", report, evaluation)
    document = json.loads((tmp_path / "v.json").read_text())
    raw = {name: np.array(values) for name, values in document["per_sequence"].items()}
    tokens = raw["tokens"].sum()
    assert tokens == report.predicted_tokens
    ratio = math.exp((raw["nll_gated"].sum() - raw["nll_dense"].sum()) / tokens)
    assert ratio == pytest.approx(report.measures["ppl_ratio"], rel=1e-5)
    assert raw["agree"].sum() / tokens == pytest.approx(report.measures["agreement"])
    assert raw["skipped"].sum() / tokens / 4 == pytest.approx(report.measures["skip_ratio"])


def test_intervals_are_of_sequences_not_of_tokens(tiny, gate, uneven):
    """Drawn whole, because tokens of one sequence resemble each other; and the same for the same seed."""
    _, evaluation = validate(tiny, gate, uneven, ValidateOptions(5))
    width = np.subtract(*reversed(evaluation.intervals(0)["agreement"]))
    finer = replace(evaluation, columns=evaluation.columns | {"sequence": np.arange(evaluation.predicted)})
    assert width != pytest.approx(np.subtract(*reversed(finer.intervals(0)["agreement"])), rel=0.02)
    assert evaluation.intervals(0) == evaluation.intervals(0)


# Simulation and reality --------------------------------------------------------------------------------------


def test_one_checkpoint_is_simulated_exactly(tiny, copied, uneven):
    """Its only decision reads a state that no skip has touched yet."""
    report = calibrate(copied, CalibrateOptions(layers=(2,), rates=(0.5,)))
    rule = gate_from_thresholds(Thresholds.read(report.file), copied, tiny.decoder)
    found, _ = validate(tiny, rule, uneven, ValidateOptions(5))
    assert found.reality.skip_rates == found.simulation.skip_rates
    assert 0.1 < found.reality.mlp_skip_ratio < 0.5
    assert found.reality.exit_rates == found.simulation.exit_rates


def test_a_cascade_whose_only_exit_is_its_last_is_simulated_exactly(tiny, copied, uneven):
    report = calibrate(copied, CalibrateOptions(rates=(0.0, 0.0, 0.6)))
    rule = gate_from_thresholds(Thresholds.read(report.file), copied, tiny.decoder)
    found, _ = validate(tiny, rule, uneven, ValidateOptions(5))
    assert found.reality.skip_rates == found.simulation.skip_rates
    assert found.reality.skip_rates[3] > 0.2


def test_early_exits_change_later_decisions(tiny, gate, other_text):
    report, evaluation = validate(tiny, gate, TextSpec(str(other_text), max_length=64), ValidateOptions(5))
    real, simulated = evaluation.real.exit_layer, evaluation.simulated.exit_layer
    assert torch.equal(real == 1, simulated == 1)  # the first checkpoint has nothing before it
    assert report.reality.skip_rates[1] == report.simulation.skip_rates[1]
    assert not torch.equal(real, simulated)


def test_the_calibration_text_is_simulated_too(tiny, gate, collected, uneven):
    data = CollectedData.open(collected)
    report, _ = validate(tiny, gate, uneven, ValidateOptions(5), data)
    promised = Thresholds.read(collected / "thresholds.json").found_by["checkpoints"]
    allowed = float((data.positions() >= 4).float().mean())
    first = report.simulation_collected.exit_rates[1]
    assert first == pytest.approx(promised[0]["exit_rate"] * allowed, abs=1e-6)  # here, of all tokens
    assert report.simulation_collected.tokens == data.tokens


def test_a_gate_that_leaves_prompts_alone_is_measured_as_in_decoding(tiny, uneven):
    """Text read in one pass would otherwise be a prompt from end to end, and every such gate would look harmless."""
    everywhere, decode = (
        validate(tiny, AlwaysGate(4, 2, Guards(prefill=p)), uneven, ValidateOptions(5))[0] for p in (True, False)
    )
    assert decode.measures == everywhere.measures
    assert decode.measures["ppl_ratio"] != 1.0
    assert decode.simulation.mlp_skip_ratio == decode.reality.mlp_skip_ratio == 0.5


# Overlap -----------------------------------------------------------------------------------------------------


def test_text_that_was_calibrated_on_is_refused(tiny, gate, collected, text_file, other_text):
    data = CollectedData.open(collected)
    same = TextSpec(str(text_file), samples=150, max_length=50, seed=3)  # cut at other places, in another order
    with pytest.raises(InputError, match=r"\d+% of this text is in the calibration text") as caught:
        validate(tiny, gate, same, ValidateOptions(), data)
    assert "--allow-overlap" in caught.value.hint
    report, _ = validate(tiny, gate, same, ValidateOptions(allow_overlap=True), data)
    assert report.sequences == 150
    validate(tiny, gate, TextSpec(str(other_text), samples=10, max_length=50), ValidateOptions(), data)


def test_short_samples_are_recognised_too(tiny, gate, tmp_path, tiny_folder):
    from sedac_cli.pipeline.collect import CollectOptions, collect

    for name, first in (("a", 0), ("b", 1000)):
        rows = [json.dumps({"text": f"line {first + n}"}) for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    a, b = (TextSpec(str(tmp_path / f"{name}.jsonl"), samples=40, pack=False) for name in "ab")
    collect(CollectOptions(layers=(1, 2, 3), save_dir=tmp_path / "d"), ModelSpec(str(tiny_folder)), a)
    data = CollectedData.open(tmp_path / "d")
    with pytest.raises(InputError, match="100% of this text"):
        validate(tiny, gate, a, ValidateOptions(), data)
    validate(tiny, gate, b, ValidateOptions(), data)


# The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_folder, copied, other_text):
    return ["validate", "--model", tiny_folder, "--data-dir", copied, "--dataset", other_text, "--samples", 8,
            "--max-length", 40, "--quiet"]  # fmt: skip


def test_a_missed_limit_is_1_with_all_results(sedac, command, copied):
    assert sedac(*command, "--max-ppl-ratio", 1000, "--min-agreement", 0).code == 0
    (copied / "validate.json").unlink()
    missed = sedac(*command, "--max-ppl-ratio", 0.5)
    assert missed.code == 1
    assert "limit missed: ppl ratio" in missed.err
    assert "agreement" not in missed.err
    assert "ppl ratio" in missed.out
    written = json.loads((copied / "validate.json").read_text())
    assert written["report"]["measures"]["ppl_ratio"] > 0.5


def test_not_a_number_misses_every_limit(sedac, command, monkeypatch):
    from sedac_cli.pipeline.evaluate import Evaluation

    real = Evaluation.measures
    monkeypatch.setattr(Evaluation, "measures", lambda *a: real(*a) | {"ppl_ratio": math.nan, "agreement": math.nan})
    result = sedac(*command, "--max-ppl-ratio", 1000, "--min-agreement", 0)
    assert result.code == 1
    assert "ppl ratio nan" in result.err
    assert "agreement nan" in result.err


@pytest.mark.parametrize(
    ("seed", "change", "said"),
    [
        (0, {"num_hidden_layers": 6}, r"num_hidden_layers is 4 there .* and 6 here"),
        (0, {"hidden_size": 64}, r"hidden_size is 32 there .* and 64 here"),
        (1, {}, r"other weights of the same architecture: a weight is -?[\d.e-]+ there .* and -?[\d.e-]+ here"),
    ],
)
def test_thresholds_of_another_model_are_refused(sedac, command, copied, tmp_path, seed, change, said):
    import re

    other = save_tiny(tmp_path / "other", seed=seed, **change)
    command[command.index("--model") + 1] = other
    spec = f"cascade:{copied / 'thresholds.json'}"
    elsewhere = [x if x != copied else tmp_path / "empty" for x in command]
    runs = (command, [*elsewhere, "--gate", spec], [*elsewhere, "--thresholds", copied / "thresholds.json"])
    for args in (*runs, ["generate", "--model", other, "--gate", spec, "--prompt", "x"]):
        result = sedac(*args)
        assert result.code == 3, args
        assert re.search(said, result.err), result.err
        assert result.out == ""


def test_gates_that_are_not_there(sedac, command, copied):
    (copied / "thresholds.json").rename(copied / "t.json")
    assert sedac(*command).code == 3
    assert sedac(*command, "--gate", "cascad:x").code == 2
    assert "Did you mean 'cascade'" in sedac(*command, "--gate", "cascad:x").err
    assert sedac(*command, "--gate", "always:9").code == 2
    assert sedac(*command, "--gate", "always:x").code == 2
    assert sedac(*command, "--gate", "random").code == 2
    assert sedac(*command, "--gate", f"fixed:{copied / 't.json'}").code == 2
    assert sedac(*command, "--gate", "never", "--thresholds", copied / "t.json").code == 2
    assert sedac(*command, "--gate", f"cascade:{copied / 't.json'}").code == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_known_again_in_any_precision(tiny, tiny_folder, dtype):
    tiny.identity.require_same(load_model(ModelSpec(str(tiny_folder), dtype=dtype)).identity, "x")
