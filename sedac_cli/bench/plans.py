"""The gate of an experiment: a spec, or the `sedac_*` keys that matrices of earlier versions use.

plan = plan_of(experiment, loaded.decoder, loaded.identity, seed=0)
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from sedac_cli.artifacts.manifest import ModelIdentity
from sedac_cli.bench.matrix import Experiment
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.cascade import CascadeGate, FixedGate
from sedac_cli.gates.registry import build_gate
from sedac_cli.gates.simple import NeverGate
from sedac_cli.probes import LREProbe, load_probe, probe_name
from sedac_cli.runtime.plan import Plan, check_spec, make_plan
from sedac_cli.standins import ZeroStandIn
from sedac_cli.structure import Decoder

# What the earlier versions took where a matrix said nothing.
LAYERS = [7, 14, 21]
THRESHOLDS = [0.8, 1.3, 1.7]
EXIT_RATES = [0.2, 0.6, 0.9]


def check_experiment(experiment: Experiment) -> None:
    """Refuse what is wrong with its gate whatever the model. A file that is not there is that configuration's crash, later."""
    if not experiment.how.needs_gate:
        return
    if experiment.gate is not None:
        with contextlib.suppress(InputError):
            check_spec(experiment.gate)
        return
    layers = _layers(experiment)
    _rates(experiment, layers) if _adapts(experiment) else _thresholds(experiment, layers)


def plan_of(experiment: Experiment, decoder: Decoder, identity: ModelIdentity | None, seed: int) -> Plan:
    """A fresh gate for every call: adaptive thresholds learn, and no run may profit from another's."""
    if not experiment.how.needs_gate:
        return Plan(NeverGate(decoder.num_layers), ZeroStandIn())
    if experiment.gate is not None:
        if experiment.how.name == "gated_adaptive":
            return _adapted(experiment, decoder, identity, seed)
        return make_plan(experiment.gate, decoder, identity, seed=seed)
    layers = _layers(experiment)
    probes = {layer: _probe(experiment, layer, decoder) for layer in layers}
    if _adapts(experiment):
        limits: AdaptiveThresholds | dict[int, float] = _rates(experiment, layers)
    else:
        limits = dict(zip(layers, _thresholds(experiment, layers), strict=True))
    kind = FixedGate if len(layers) == 1 else CascadeGate
    return Plan(kind(decoder.num_layers, probes, limits), ZeroStandIn())


EARLIER = ("sedac", "sedac_adaptive")
"""Modes whose name alone meant probes at these layers."""


def label_of(experiment: Experiment) -> str | None:
    """The gate as a reader of the results should see it."""
    if not experiment.how.needs_gate:
        return None
    if experiment.gate is not None:
        return experiment.gate
    given = experiment.model_dump(exclude_none=True)
    parts = {k.removeprefix("sedac_"): v for k, v in given.items() if k.startswith("sedac_") and k != "sedac_enabled"}
    parts.pop("log_every", None)
    return "probes: " + ", ".join(f"{k}={v}" for k, v in parts.items())


def _adapts(experiment: Experiment) -> bool:
    if experiment.sedac_adaptive is not None:
        return experiment.sedac_adaptive
    return experiment.how.name == "gated_adaptive"


def _adapted(experiment: Experiment, decoder: Decoder, identity: ModelIdentity | None, seed: int) -> Plan:
    gate = make_plan(str(experiment.gate), decoder, identity, seed=seed).gate
    layers = sorted(getattr(gate, "probes", {}))
    if not layers:
        raise UsageError(f"'{experiment.name}': gate '{experiment.gate}' has no thresholds to adapt")
    rates = _rates(experiment, layers)
    return Plan(build_gate(str(experiment.gate), decoder, identity=identity, adaptive=rates), ZeroStandIn())


def _layers(experiment: Experiment) -> list[int]:
    layers = experiment.sedac_probe_layers or ([] if experiment.sedac_layer is None else [experiment.sedac_layer])
    if not layers and experiment.mode in EARLIER:
        layers = LAYERS
    if not layers:
        raise UsageError(
            f"'{experiment.name}' runs in mode '{experiment.mode}' and names no gate",
            hint='"gate": "always:14", or sedac_probe_layers and sedac_probe_dir',
        )
    return sorted(layers)


def _thresholds(experiment: Experiment, layers: list[int]) -> list[float]:
    found = experiment.sedac_thresholds or (
        [] if experiment.sedac_threshold is None else [experiment.sedac_threshold] * len(layers)
    )
    if not found and layers == LAYERS:
        found = THRESHOLDS
    if len(found) != len(layers):
        raise UsageError(f"'{experiment.name}': {len(found)} sedac_thresholds for layers {layers}")
    return found


def _rates(experiment: Experiment, layers: list[int]) -> AdaptiveThresholds:
    rates = experiment.sedac_exit_rates or (EXIT_RATES if len(layers) == len(EXIT_RATES) else [])
    if len(rates) != len(layers):
        raise UsageError(f"'{experiment.name}': {len(rates)} sedac_exit_rates for layers {layers}")
    return AdaptiveThresholds(dict(zip(layers, rates, strict=True)), experiment.sedac_calibration_steps or 50)


def _probe(experiment: Experiment, layer: int, decoder: Decoder) -> LREProbe:
    path = Path(experiment.sedac_probe_path or Path(experiment.sedac_probe_dir or "sedac_data") / probe_name(layer))
    probe = load_probe(path, decoder.hidden_size)
    if experiment.sedac_probe_rank not in (None, probe.rank):
        raise UsageError(f"{path} has rank {probe.rank}, sedac_probe_rank says {experiment.sedac_probe_rank}")
    return probe
