"""Thresholds let go the share that was asked for, of the tokens that reach each checkpoint, by the gate's own rule."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import write_collection

from sedac_cli.artifacts.thresholds import Thresholds
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.pipeline.calibrate import CalibrateOptions, calibrate, rates_for, threshold_at
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.pipeline.simulate import sequence_batches, simulate_collected
from sedac_cli.pipeline.train_probes import TrainOptions, train_probes
from sedac_cli.probes import load_probe


@pytest.fixture
def ready(synthetic):
    train_probes(synthetic, TrainOptions(epochs=1, batch_size=128, rank=4))
    return synthetic


def played_by_hand(folder, limits: dict[int, float], sinks: int, batch: int | None = None) -> list[int]:
    """Exit layer of every token, one by one in plain Python. `batch`: rule `max` over that many sequences."""
    data = CollectedData.open(folder)
    risks = {x: load_probe(folder / f"sedac_probe_layer{x}.pth")(data.states[x]).tolist() for x in limits}
    positions, sequences = data.positions().tolist(), data.sequence_ids.tolist()
    steps: dict[tuple[int, int], list[int]] = {}
    for token, (position, sequence) in enumerate(zip(positions, sequences, strict=True)):
        key = (sequence // batch, position) if batch else (token, 0)
        steps.setdefault(key, []).append(token)
    exits = [4] * data.tokens
    for layer, limit in limits.items():
        for (_, _), tokens in steps.items():
            there = [t for t in tokens if exits[t] == 4]
            if there and positions[there[0]] >= sinks and max(risks[layer][t] for t in there) < limit:
                for token in there:
                    exits[token] = layer
    return exits


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("rates", [(0.2, 0.5), (0.0, 0.4), (0.3, 1.0), (1.0, 0.5), (0.0, 0.0)])
def test_rates_are_reached_among_the_tokens_that_get_there(ready, rates, batch):
    options = CalibrateOptions(rates=rates, batch_rule="max" if batch else "token", batch_size=batch or 8)
    report = calibrate(ready, options)
    limits = Thresholds.read(report.file).by_layer
    exits = played_by_hand(ready, limits, sinks=4, batch=batch)
    positions = CollectedData.open(ready).positions().tolist()
    remaining = [e for e, p in zip(exits, positions, strict=True) if p >= 4]
    step = batch or 1
    for checkpoint, rate in zip(report.checkpoints, rates, strict=True):
        left = sum(e == checkpoint.layer for e in remaining)
        assert checkpoint.reached == len(remaining)
        assert left >= round(rate * len(remaining))
        assert left < round(rate * len(remaining)) + max(step, 1) or rate == 0 == left
        assert checkpoint.exit_rate == pytest.approx(left / max(1, len(remaining)))
        remaining = [e for e in remaining if e != checkpoint.layer]
    skipped = sum(4 - e for e in exits)
    assert report.mlp_skip_ratio == pytest.approx(skipped / (4 * len(exits)))
    assert report.exited_share == pytest.approx(sum(e < 4 for e in exits) / len(exits))


def test_the_file_can_be_written_whatever_the_rates(ready):
    """Nobody exits, so the mean label of those who exit is not a number: the file says null."""
    report = calibrate(ready, CalibrateOptions(rates=(0.0,)))
    document = json.loads(report.file.read_text())
    assert document["found_by"]["checkpoints"][0]["exited_label"] is None
    assert document["thresholds"] == [0.0, 0.0]
    assert document["promise"] == {
        "kind": "exit-rate", "target": {"rates": [0.0, 0.0]}, "confidence": None, "calibration_sequences": None,
        "bound": None, "candidates": None,
    }  # fmt: skip


def test_ties_go_together():
    risk = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0])
    assert int((risk < threshold_at(risk, 0.2)).sum()) == 3  # at least the share: equal risks are treated alike
    assert int((risk < threshold_at(risk, 0.6)).sum()) == 3
    assert int((risk < threshold_at(risk, 0.8)).sum()) == 4
    assert int((risk < threshold_at(risk, 1.0)).sum()) == 5
    assert int((risk < threshold_at(risk, 0.0)).sum()) == 0
    assert threshold_at(torch.empty(0), 0.5) == 0.0
    assert threshold_at(torch.zeros(4), 0.5) > 0


@pytest.mark.parametrize(("strategy", "share"), [("conservative", 0.10), ("balanced", 0.15), ("aggressive", 0.25)])
def test_strategies_are_a_total(ready, strategy, share):
    report = calibrate(ready, CalibrateOptions(strategy=strategy, guards=Guards()))
    assert report.exited_share == pytest.approx(share, abs=0.005)
    first, second = report.checkpoints
    assert first.exit_rate == pytest.approx(second.exit_rate, abs=0.005)
    each = rates_for(strategy, 7)
    assert (1 - each[0]) ** 7 == pytest.approx(1 - share)


def test_balanced_is_the_default(ready):
    assert calibrate(ready, CalibrateOptions(guards=Guards())).exited_share == pytest.approx(0.15, abs=0.005)


def test_sinks_never_exit(ready):
    for sinks in (0, 4, 9):
        report = calibrate(ready, CalibrateOptions(rates=(1.0, 1.0), guards=Guards(sinks=sinks)))
        data = CollectedData.open(ready)
        expected = int((data.positions() >= sinks).sum())
        assert report.checkpoints[0].reached == expected
        assert report.exited_share == pytest.approx(expected / data.tokens)


def test_protected_layers_and_prompts(ready):
    """Exits are counted where they are decided; what they skip, where the guards let them."""
    plain = calibrate(ready, CalibrateOptions(rates=(0.5, 0.5)))
    late = calibrate(ready, CalibrateOptions(rates=(0.5, 0.5), guards=Guards(sinks=4, first=2)))
    assert [c.exit_rate for c in late.checkpoints] == [c.exit_rate for c in plain.checkpoints]
    gone = plain.checkpoints[0].exit_rate * plain.checkpoints[0].reached / plain.tokens
    assert plain.mlp_skip_ratio - late.mlp_skip_ratio == pytest.approx(gone / 4)
    ends = calibrate(ready, CalibrateOptions(rates=(0.5, 0.5), guards=Guards(sinks=4, last=1)))
    assert ends.checkpoints[1].exit_rate == 0.0  # there is nothing to skip from the last layer on
    decode = calibrate(ready, CalibrateOptions(rates=(0.5, 0.5), guards=Guards(sinks=4, prefill=False)))
    assert decode.mlp_skip_ratio == plain.mlp_skip_ratio  # the text stands for generated tokens


def test_one_checkpoint_is_a_fixed_gate(ready):
    report = calibrate(ready, CalibrateOptions(layers=(3,), rates=(0.5,)))
    assert report.gate == Thresholds.read(report.file).gate == "fixed"


def test_thresholds_elsewhere_find_their_probes(ready, tmp_path):
    report = calibrate(ready, CalibrateOptions(out=tmp_path / "new" / "t.json"))
    found = Thresholds.read(report.file)
    for probe in found.probes.values():
        probe.verify(report.file.parent)
    assert CollectedData.open(ready).manifest.steps["calibrate"].files == {}


# Mistakes ----------------------------------------------------------------------------------------------------


def test_the_number_of_rates(ready):
    with pytest.raises(UsageError, match=r"3 exit rates for 2 layers \[1, 3\]"):
        calibrate(ready, CalibrateOptions(rates=(0.1, 0.2, 0.3)))


@pytest.mark.parametrize("rates", ["0.2,1.5", "-0.1", "nan", "a", "0.1,,0.2"])
def test_rates_that_make_no_sense(sedac, rates):
    assert sedac("calibrate", f"--target-exit-rate={rates}").code == 2


def test_strategies_that_do_not_exist_or_contradict(sedac, ready):
    assert sedac("calibrate", "--target-exit-rate", "0.1", "--strategy", "balanced").code == 2
    unknown = sedac("calibrate", "--strategy", "bold", "--data-dir", ready)
    assert unknown.code == 2
    assert "conservative, balanced, aggressive" in unknown.err


def test_probes_must_be_there_and_unaltered(synthetic):
    with pytest.raises(InputError, match="`sedac train-probes` has not been run there"):
        calibrate(synthetic, CalibrateOptions())
    train_probes(synthetic, TrainOptions(layers=(1,), epochs=1, rank=4))
    with pytest.raises(UsageError, match="layer 3 has no trained probe"):
        calibrate(synthetic, CalibrateOptions())
    probe = synthetic / "sedac_probe_layer1.pth"
    content = bytearray(probe.read_bytes())
    content[len(content) // 2] ^= 1
    probe.write_bytes(content)
    with pytest.raises(InputError, match=r"sedac_probe_layer1\.pth was truncated or altered"):
        calibrate(synthetic, CalibrateOptions(layers=(1,)))
    assert not (synthetic / "thresholds.json").exists()


# Simulation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 5])
def test_simulation_is_the_rule_token_by_token(ready, batch):
    data = CollectedData.open(ready)
    probes = {x: load_probe(ready / f"sedac_probe_layer{x}.pth") for x in (1, 3)}
    risks = {x: probes[x](data.states[x]) for x in (1, 3)}
    limits = {x: float(risks[x].quantile(0.7)) for x in (1, 3)}
    gate = CascadeGate(4, probes, limits, "max" if batch else "token", Guards(sinks=2))
    outcome = simulate_collected(gate, data, batch or 4)
    expected = played_by_hand(ready, limits, sinks=2, batch=batch)
    assert outcome.exit_layer.tolist() == expected
    assert outcome.skipped.tolist() == [4 - e for e in expected]
    assert outcome.skipped_per_layer.tolist() == [sum(e <= layer for e in expected) for layer in range(4)]
    assert len(set(expected)) == 3


def test_a_gate_that_reads_what_was_not_collected(ready):
    data = CollectedData.open(ready, [1])
    probes = {x: load_probe(ready / f"sedac_probe_layer{x}.pth") for x in (1, 3)}
    with pytest.raises(InputError, match="reads layer 3, whose states were not collected") as caught:
        simulate_collected(CascadeGate(4, probes, {1: 0.5, 3: 0.5}), data, 4)
    assert caught.value.hint == "collect with --layers 1,3"


def test_batches_of_sequences_cover_every_row_once():
    ids = torch.repeat_interleave(torch.tensor([2, 5, 6, 9, 11]), torch.tensor([3, 1, 4, 2, 6]))
    batches = sequence_batches(ids, 2)
    assert [tuple(rows.shape) for rows, _ in batches] == [(2, 3), (2, 4), (1, 6)]
    assert torch.cat([rows[real] for rows, real in batches]).tolist() == list(range(16))


def test_positions_start_again_with_every_sequence(tmp_path):
    x = torch.randn(6, 4)
    folder = write_collection(tmp_path / "d", {1: x}, {1: x[:, 0].abs()}, [1, 2, 3])
    data = CollectedData.open(folder)
    assert data.positions().tolist() == [0, 0, 1, 0, 1, 2]
    assert replace(data, sequence_ids=data.sequence_ids + 7).positions().tolist() == [0, 0, 1, 0, 1, 2]
