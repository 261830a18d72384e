"""Train one LREProbe per collected layer, and say against simple baselines whether it learned anything.

Sequences, not tokens, are held out: half of them choose the epoch, the other half give the reported figures, so no figure
comes from text that helped to choose. Inputs are standardized for training and the scaling is folded into the weights.

    report = train_probes(Path("sedac_data"), TrainOptions(epochs=10))
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.artifacts.files import folder_lock
from sedac_cli.artifacts.manifest import Manifest, make_step
from sedac_cli.artifacts.tensors import save_tensors
from sedac_cli.errors import InputError
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.pipeline.rank import auc_low, spearman
from sedac_cli.probes import LREProbe, probe_name

STEP = "train-probes"


@dataclass(frozen=True)
class TrainOptions:
    layers: tuple[int, ...] | None = None
    epochs: int = 20
    batch_size: int = 1024
    rank: int = 64
    lr: float = 1e-3
    holdout: float = 0.1
    bottom: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """On held-out tokens. `auc` is for telling the `bottom` share of labels (the safest tokens) from the rest."""

    spearman: float
    mae: float
    auc: float


@dataclass(frozen=True)
class LayerReport:
    layer: int
    file: str
    best_epoch: int
    probe: Scores
    linear: Scores
    constant: Scores
    seconds: float


@dataclass(frozen=True)
class TrainReport:
    data_dir: Path
    label_unit: str
    train_tokens: int
    test_tokens: int
    layers: list[LayerReport]
    seconds: float


def train_probes(folder: Path, options: TrainOptions, progress: Progress = quiet_progress) -> TrainReport:
    began = time.monotonic()
    data = CollectedData.open(folder, list(options.layers) if options.layers else None)
    train, choose, test = split_sequences(data.sequence_ids, options.holdout, options.seed)
    with folder_lock(folder):
        trained: list[tuple[LREProbe, LayerReport]] = []
        with progress(total=len(data.layers) * options.epochs, desc="train", unit="epoch") as bar:
            for layer in data.layers:
                with _few_threads(options.batch_size * data.states[layer].shape[1]):
                    trained.append(_train_layer(data, layer, train, choose, test, options, bar))
        reports = [report for _, report in trained]
        files = {report.file: save_tensors(folder / report.file, probe.state_dict()) for probe, report in trained}
        manifest = Manifest.read(folder)
        summary = {"layers": [asdict(r) for r in reports], "train_tokens": len(train), "test_tokens": len(test)}
        settings = asdict(options) | {"layers": list(data.layers)}
        steps = {k: v for k, v in manifest.steps.items() if k != "calibrate"}
        steps[STEP] = make_step(settings, files, summary)
        Manifest(model=manifest.model, steps=steps).write(folder)
    return TrainReport(folder, data.label_unit, len(train), len(test), reports, time.monotonic() - began)


@contextlib.contextmanager
def _few_threads(numbers: int) -> Iterator[None]:
    """A step on `numbers` inputs is short: threads that wait for each other cost more than they do, above all on a busy
    machine (1024 x 384 on two busy cores: 4 ms a step with one thread, 70 ms with two)."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, numbers // 2**20)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def split_sequences(sequence_ids: Tensor, holdout: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers for training, for choosing the epoch, and for the reported figures; no sequence is in two of them."""
    sequences = torch.unique(sequence_ids)
    held = max(2, round(holdout * len(sequences)))
    if len(sequences) - held < 1:
        raise InputError(f"{len(sequences)} samples are too few to hold {held} out", hint="collect more with --samples")
    order = sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))]
    parts = order[held:], order[: held // 2], order[held // 2 : held]
    train, choose, test = (torch.nonzero(torch.isin(sequence_ids, part)).flatten() for part in parts)
    return train, choose, test


def _train_layer(
    data: CollectedData, layer: int, train: Tensor, choose: Tensor, test: Tensor, options: TrainOptions, bar: Any
) -> tuple[LREProbe, LayerReport]:
    began = time.monotonic()
    states, labels = data.states[layer], data.labels[layer]
    if not torch.isfinite(labels).all():
        raise InputError(f"the labels of layer {layer} hold NaN or infinite values")
    mean, deviation = _moments(states, train)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    X = ((states[train].float() - mean) / deviation).to(device)
    Y = labels[train].to(device)
    choose_x = ((states[choose].float() - mean) / deviation).to(device)
    choose_y = labels[choose].to(device)

    generator = torch.Generator().manual_seed(options.seed * 1009 + layer)
    torch.manual_seed(options.seed * 1009 + layer)
    probe = LREProbe(X.shape[1], options.rank).to(device)
    with torch.no_grad():
        # softplus of the bias starts at the mean label: the first epochs are not spent on finding it
        probe.head.bias.fill_(float(torch.log(torch.expm1(Y.mean().clamp_min(1e-3)))))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=options.lr, weight_decay=1e-2, fused=True)
    batches = max(1, -(-len(train) // options.batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr * 4, total_steps=batches * options.epochs, pct_start=0.15
    )
    best, best_loss, best_state = 0, float("inf"), {k: v.clone() for k, v in probe.state_dict().items()}
    for epoch in range(1, options.epochs + 1):
        order = torch.randperm(len(train), generator=generator).to(device)
        for start in range(0, len(train), options.batch_size):
            rows = order[start : start + options.batch_size]
            loss = nn.functional.huber_loss(probe(X.index_select(0, rows)), Y.index_select(0, rows))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            held = float(nn.functional.huber_loss(probe(choose_x), choose_y))
        if held < best_loss:
            best, best_loss, best_state = epoch, held, {k: v.clone() for k, v in probe.state_dict().items()}
        bar.set_postfix_str(f"layer {layer} held-out loss {held:.4f}", refresh=False)
        bar.update(1)
    if best == 0:
        raise InputError(f"training the probe of layer {layer} diverged: its loss is {held}", hint="a smaller --lr")
    probe.load_state_dict(best_state)

    test_x = ((states[test].float() - mean) / deviation).to(device)
    test_y = labels[test]
    ridge = _ridge(X, Y)
    with torch.no_grad():
        scores = {
            "probe": probe(test_x).cpu(),
            "linear": ridge(test_x).cpu(),
            "constant": torch.full_like(test_y, float(Y.median())),
        }
    results = {name: _scores(guess, test_y, options.bottom) for name, guess in scores.items()}
    folded = _fold(probe.cpu(), mean, deviation)
    return folded, LayerReport(
        layer, probe_name(layer), best, results["probe"], results["linear"], results["constant"],
        time.monotonic() - began,
    )  # fmt: skip


def _moments(states: Tensor, rows: Tensor, limit: int = 65536) -> tuple[Tensor, Tensor]:
    sample = states[rows[:: max(1, len(rows) // limit)]].float()
    return sample.mean(dim=0), sample.std(dim=0).clamp_min(1e-6)


def _fold(probe: LREProbe, mean: Tensor, deviation: Tensor) -> LREProbe:
    """The same function of the raw hidden state: W((x - m)/s) + b = (W/s) x + (b - (W/s) m)."""
    with torch.no_grad():
        scaled = probe.proj.weight.double() / deviation.double()
        probe.proj.bias.copy_(probe.proj.bias.double() - scaled @ mean.double())
        probe.proj.weight.copy_(scaled)
    return probe


def _ridge(X: Tensor, Y: Tensor, strength: float = 1e-3) -> Any:
    """The linear baseline: closed-form ridge regression on the standardized states."""
    center = Y.mean()
    gram = X.T @ X
    gram.diagonal().add_(strength * X.shape[0])
    weight = torch.linalg.solve(gram, X.T @ (Y - center))
    return lambda x: (x @ weight + center).clamp_min(0.0)


def _scores(guess: Tensor, label: Tensor, bottom: float) -> Scores:
    low = label <= torch.quantile(label[:: max(1, label.numel() // 1_000_000)], bottom)
    return Scores(spearman(guess, label), float((guess - label).abs().mean()), auc_low(guess, low))
