"""Find the thresholds that let a wanted share of tokens exit at each checkpoint.

Always true: the rate of a checkpoint counts the tokens that reach it, guards and earlier exits respected; what is reported
is what the finished gate really does on the collected states, not what was asked for.

    report = calibrate(Path("sedac_data"), CalibrateOptions(rates=(0.2, 0.6, 0.9)))
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sedac_cli.artifacts.files import folder_lock, make_folder, sha256_file
from sedac_cli.artifacts.manifest import MANIFEST, Manifest, make_step
from sedac_cli.artifacts.thresholds import GuardSettings, ProbeFile, Promise, Thresholds
from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import BatchRule, CascadeGate
from sedac_cli.pipeline import train_probes
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.pipeline.simulate import sequence_batches, simulate_collected
from sedac_cli.probes import LREProbe, load_probe, probe_name

STEP = "calibrate"
STRATEGIES = {"conservative": 0.10, "balanced": 0.15, "aggressive": 0.25}
"""Share of tokens that exit at any checkpoint; spread evenly, each checkpoint letting go the same share of what it sees."""


@dataclass(frozen=True)
class CalibrateOptions:
    layers: tuple[int, ...] | None = None
    rates: tuple[float, ...] | None = None
    strategy: str | None = None
    batch_rule: BatchRule = "token"
    batch_size: int = 8
    guards: Guards = field(default_factory=lambda: Guards(sinks=4))
    out: Path | None = None


@dataclass(frozen=True)
class CheckpointReport:
    layer: int
    threshold: float
    target_rate: float
    reached: int
    exit_rate: float
    exited_label: float
    kept_label: float


@dataclass(frozen=True)
class CalibrateReport:
    file: Path
    gate: str
    label: str
    label_unit: str
    tokens: int
    checkpoints: list[CheckpointReport]
    exited_share: float
    mlp_skip_ratio: float


def probe_file(probe: Path, seen_from: Path) -> ProbeFile:
    return ProbeFile(file=os.path.relpath(probe, seen_from), sha256=sha256_file(probe))


def rates_for(strategy: str, checkpoints: int) -> tuple[float, ...]:
    if strategy not in STRATEGIES:
        raise UsageError(f"--strategy: '{strategy}' is not known", hint=", ".join(STRATEGIES))
    each = 1 - (1 - STRATEGIES[strategy]) ** (1 / checkpoints)
    return (each,) * checkpoints


def open_probes(folder: Path, layers: tuple[int, ...] | None) -> tuple[CollectedData, dict[int, LREProbe]]:
    """What was collected, and the probes trained on it, checked against the manifest."""
    data = CollectedData.open(folder, list(layers) if layers else None)
    trained = data.manifest.step(train_probes.STEP, folder)
    for layer in data.layers:
        if probe_name(layer) not in trained.files:
            raise UsageError(f"layer {layer} has no trained probe in {folder}", hint="sedac train-probes")
    data.manifest.verify(folder, train_probes.STEP, [probe_name(layer) for layer in data.layers])
    return data, {layer: load_probe(folder / probe_name(layer), data.states[layer].shape[1]) for layer in data.layers}


def calibrate(folder: Path, options: CalibrateOptions) -> CalibrateReport:
    data, probes = open_probes(folder, options.layers)
    rates = options.rates or rates_for(options.strategy or "balanced", len(data.layers))
    rates = rates * len(data.layers) if len(rates) == 1 else rates
    if len(rates) != len(data.layers):
        raise UsageError(f"{len(rates)} exit rates for {len(data.layers)} layers {list(data.layers)}")

    num_layers = data.manifest.model.architecture["num_hidden_layers"]
    limits = find_thresholds(data, collected_risks(data, probes), rates, options)
    gate = CascadeGate(num_layers, probes, limits, options.batch_rule, options.guards)
    outcome = simulate_collected(gate, data, options.batch_size)
    allowed = data.positions() >= options.guards.sinks
    checkpoints = describe(data, num_layers, limits, rates, outcome.exit_layer, allowed)

    path = options.out or folder / "thresholds.json"
    make_folder(path.parent)
    name: Literal["fixed", "cascade"] = "fixed" if len(data.layers) == 1 else "cascade"
    thresholds = Thresholds(
        gate=name,
        batch_rule=options.batch_rule,
        layers=list(data.layers),
        thresholds=[limits[layer] for layer in data.layers],
        probes={x: probe_file(folder / probe_name(x), path.parent) for x in data.layers},
        guards=GuardSettings(**asdict(options.guards)),
        target_label=data.target,
        found_by={
            "method": "quantiles of collected risks among tokens that reach each checkpoint",
            "strategy": options.strategy if not options.rates else None,
            "tokens": data.tokens,
            "checkpoints": [asdict(c) for c in checkpoints],
        },
        promise=Promise(kind="exit-rate", target={"rates": list(rates)}),
        model=data.manifest.model,
    )
    settings = asdict(options) | {"rates": list(rates), "out": str(path)}
    write_thresholds(thresholds, path, folder, settings)
    return CalibrateReport(
        file=path,
        gate=name,
        label=data.target,
        label_unit=data.label_unit,
        tokens=data.tokens,
        checkpoints=checkpoints,
        exited_share=float((outcome.exit_layer < num_layers).float().mean()),
        mlp_skip_ratio=float(outcome.skipped_per_layer.sum()) / (outcome.tokens * num_layers),
    )


def write_thresholds(thresholds: Thresholds, path: Path, folder: Path, settings: dict[str, Any]) -> None:
    """The file, and the step in the manifest of the data folder, if there is one."""
    if not (folder / MANIFEST).exists():
        thresholds.write(path)
        return
    with folder_lock(folder):
        thresholds.write(path)
        manifest = Manifest.read(folder)
        files = {path.name: sha256_file(path)} if path.parent.resolve() == folder.resolve() else {}
        summary = {"thresholds": thresholds.thresholds, "parameters": thresholds.parameters}
        manifest.steps[STEP] = make_step(settings, files, summary)
        manifest.write(folder)


@torch.no_grad()
def collected_risks(data: CollectedData, probes: dict[int, LREProbe]) -> dict[int, Tensor]:
    """What each probe says about each collected token, by layer: [tokens]."""
    risks = {}
    for layer in data.layers:
        risks[layer] = torch.cat([probes[layer](rows) for rows in data.states[layer].split(16384)])
        if not torch.isfinite(risks[layer]).all():
            raise UsageError(f"the probe of layer {layer} gives NaN on the collected states")
    return risks


def find_thresholds(
    data: CollectedData, risks: dict[int, Tensor], rates: tuple[float, ...], options: CalibrateOptions
) -> dict[int, float]:
    """For each checkpoint the risk under which `rate` of the tokens still there lie."""
    allowed = data.positions() >= options.guards.sinks
    batches = sequence_batches(data.sequence_ids, options.batch_size)
    gone = torch.zeros(data.tokens, dtype=torch.bool)
    limits = {}
    for layer, rate in zip(data.layers, rates, strict=True):
        risk = risks[layer]
        if options.batch_rule == "max":
            risk = step_maximum(risk, batches)
        here = allowed & ~gone
        limits[layer] = threshold_at(risk[here], rate)
        gone |= here & (risk < limits[layer])
    return limits


def threshold_at(risk: Tensor, rate: float) -> float:
    """The smallest float32 limit with at least `rate` of the risks under it (a risk equal to the limit stays)."""
    count = round(rate * risk.numel())
    if count == 0:
        return 0.0
    highest = torch.kthvalue(risk, count).values
    return float(torch.nextafter(highest, torch.tensor(torch.inf)))


def step_maximum(risk: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Under batch rule `max`: the risk of a token is the largest of those that share its step, which go together."""
    out = risk.clone()
    for rows, real in batches:
        top = torch.where(real, risk[rows], -torch.inf).amax(dim=0, keepdim=True).expand(rows.shape)
        out[rows[real]] = top[real]
    return out


def describe(
    data: CollectedData,
    num_layers: int,
    limits: dict[int, float],
    rates: tuple[float, ...],
    exit_layer: Tensor,
    allowed: Tensor,
) -> list[CheckpointReport]:
    """What the finished gate did at each checkpoint; tokens that may never skip are not among those that reach it."""
    reports = []
    after = [*list(limits)[1:], num_layers]
    for (layer, limit), rate, following in zip(limits.items(), rates, after, strict=True):
        reached = allowed & (exit_layer >= layer)
        # A token that fires at a protected layer skips from the first one that is not.
        left = (exit_layer >= layer) & (exit_layer < following)
        label = data.labels[layer]
        stays = reached & ~left
        reports.append(
            CheckpointReport(
                layer=layer,
                threshold=limit,
                target_rate=rate,
                reached=int(reached.sum()),
                exit_rate=float(left.sum() / reached.sum().clamp_min(1)),
                exited_label=float(label[left].mean()) if left.any() else float("nan"),
                kept_label=float(label[stays].mean()) if stays.any() else float("nan"),
            )
        )
    return reports
