"""Training: reproducible, honest about what it held out, better than a line where the truth is not one."""

from __future__ import annotations

import pytest
import torch
from conftest import write_collection
from scipy import stats

from sedac_cli.errors import InputError, UsageError
from sedac_cli.pipeline import train_probes as module
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.pipeline.train_probes import TrainOptions, split_sequences, train_probes
from sedac_cli.probes import LREProbe, load_probe

QUICK = TrainOptions(epochs=2, batch_size=128, rank=4)
NAMES = ("sedac_probe_layer1.pth", "sedac_probe_layer3.pth")


def trained(folder, **changes) -> list[bytes]:
    from dataclasses import replace

    train_probes(folder, replace(QUICK, **changes))
    return [(folder / name).read_bytes() for name in NAMES]


def test_same_seed_same_bytes(synthetic):
    first = trained(synthetic)
    assert trained(synthetic) == first
    other = trained(synthetic, seed=1)
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert first[0] != first[1]


def test_one_layer_trains_the_same_alone(synthetic):
    both = trained(synthetic)
    train_probes(synthetic, TrainOptions(layers=(3,), epochs=2, batch_size=128, rank=4))
    assert (synthetic / NAMES[1]).read_bytes() == both[1]
    manifest = CollectedData.open(synthetic).manifest
    assert list(manifest.steps["train-probes"].files) == [NAMES[1]]


@pytest.mark.parametrize("sequences", [4, 16, 100])
def test_no_sequence_is_in_two_parts(sequences):
    ids = torch.repeat_interleave(torch.arange(sequences) * 3, 5)
    parts = split_sequences(ids, 0.1, seed=0)
    assert sorted(torch.cat(parts).tolist()) == list(range(sequences * 5))
    held = [set(ids[rows].tolist()) for rows in parts]
    assert all(held)
    assert not (held[0] & held[1] | held[0] & held[2] | held[1] & held[2])
    assert len(held[1]) + len(held[2]) == max(2, round(0.1 * sequences))
    assert any(not torch.equal(a, b) for a, b in zip(parts, split_sequences(ids, 0.1, seed=1), strict=True))


def test_too_few_sequences_to_hold_any_out(tmp_path):
    x = torch.randn(20, 4)
    folder = write_collection(tmp_path / "d", {1: x}, {1: x[:, 0].abs()}, [10, 10])
    with pytest.raises(InputError, match="2 samples are too few"):
        train_probes(folder, QUICK)
    assert not (folder / "sedac_probe_layer1.pth").exists()


def test_reported_figures_are_those_of_held_out_sequences(synthetic):
    """Compute them again from the file on disk and the raw states: the saved probe is the one that was reported."""
    report = train_probes(synthetic, QUICK)
    data = CollectedData.open(synthetic)
    _, _, test = split_sequences(data.sequence_ids, QUICK.holdout, QUICK.seed)
    assert report.test_tokens == len(test)
    for row in report.layers:
        label = data.labels[row.layer][test]
        guess = load_probe(synthetic / row.file)(data.states[row.layer][test])
        assert row.probe.mae == pytest.approx((guess - label).abs().mean().item(), rel=1e-4)
        assert row.probe.spearman == pytest.approx(stats.spearmanr(guess.numpy(), label.numpy()).statistic, abs=2e-3)
        assert row.constant.auc == 0.5
        assert row.constant.spearman == 0.0


def test_labels_of_the_test_part_do_not_reach_the_probe(tmp_path, synthetic):
    """Change every label of the held-out figures: the probe's bytes stay, the figures do not."""
    before = trained(synthetic)
    data = CollectedData.open(synthetic)
    _, _, test = split_sequences(data.sequence_ids, QUICK.holdout, QUICK.seed)
    labels = {layer: value.clone() for layer, value in data.labels.items()}
    for value in labels.values():
        value[test] = 50.0
    lengths = torch.unique_consecutive(data.sequence_ids, return_counts=True)[1].tolist()
    other = write_collection(tmp_path / "other", dict(data.states), labels, lengths)
    assert trained(other) == before
    assert train_probes(other, QUICK).layers[0].probe.mae > 40


def test_the_folded_probe_is_the_standardized_one():
    torch.manual_seed(0)
    probe = LREProbe(12, 5)
    x = torch.randn(100, 12) * torch.logspace(-2, 2, 12) + torch.linspace(-30, 30, 12)
    mean, deviation = x.mean(0), x.std(0)
    expected = probe((x - mean) / deviation).detach()
    got = module._fold(probe, mean, deviation)(x).detach()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(LREProbe(12, 5)(x), expected, atol=1e-2)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_planted_nonlinear_signal_is_learned_and_a_line_cannot(tmp_path, offset):
    """label = |u.x|: a linear map of x is uncorrelated with it. The offset is large and means nothing."""
    generator = torch.Generator().manual_seed(1)
    lengths = [100] * 60
    x = torch.randn(6000, 16, generator=generator)
    direction = torch.randn(16, generator=generator)
    label = 2 * (x @ direction / direction.norm()).abs() + 0.1
    folder = write_collection(tmp_path / "d", {1: x + offset}, {1: label}, lengths)
    report = train_probes(folder, TrainOptions(epochs=15, batch_size=256, rank=16, lr=3e-3)).layers[0]
    assert report.probe.spearman > 0.9
    assert abs(report.linear.spearman) < 0.2
    assert report.probe.mae < 0.4 * min(report.linear.mae, report.constant.mae)
    assert report.probe.auc > 0.95
    assert report.linear.auc < 0.65


def test_the_linear_baseline_is_a_good_one(tmp_path):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4000, 8, generator=generator) * 3 + 5
    label = (x @ torch.randn(8, generator=generator)).clamp_min(-50) + 60
    folder = write_collection(tmp_path / "d", {1: x}, {1: label}, [50] * 80)
    assert train_probes(folder, QUICK).layers[0].linear.spearman > 0.999


def test_a_constant_state_and_a_constant_label_do_no_harm(tmp_path):
    x = torch.randn(400, 6)
    x[:, 2] = 7.0
    folder = write_collection(tmp_path / "d", {1: x}, {1: torch.full((400,), 3.0)}, [20] * 20)
    row = train_probes(folder, QUICK).layers[0]
    assert torch.isfinite(load_probe(folder / row.file)(x)).all()
    assert row.constant.mae == 0.0


def test_divergence_and_bad_labels_are_said_and_nothing_is_written(tmp_path, synthetic):
    with pytest.raises(InputError, match="training the probe of layer 1 diverged") as caught:
        train_probes(synthetic, TrainOptions(epochs=1, rank=4, lr=1e30))
    assert caught.value.hint == "a smaller --lr"
    x = torch.randn(200, 4)
    bad = write_collection(tmp_path / "bad", {1: x, 3: x}, {1: x[:, 0].abs(), 3: x[:, 0] / 0}, [20] * 10)
    with pytest.raises(InputError, match="labels of layer 3 hold NaN or infinite"):
        train_probes(bad, QUICK)
    for folder in (synthetic, bad):
        assert not list(folder.glob("*.pth"))
        assert "train-probes" not in CollectedData.open(folder).manifest.steps


def test_layers_that_were_not_collected(synthetic):
    with pytest.raises(UsageError, match=r"layer 2 was not collected in .*: it holds \[1, 3\]"):
        train_probes(synthetic, TrainOptions(layers=(1, 2)))


def test_training_again_forgets_thresholds_of_the_old_probes(copied):
    assert "calibrate" in CollectedData.open(copied).manifest.steps
    train_probes(copied, TrainOptions(epochs=1, rank=4))
    assert "calibrate" not in CollectedData.open(copied).manifest.steps
