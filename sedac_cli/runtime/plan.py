"""A gate together with what stands in for the MLPs it skips: what every runtime needs to run.

plan = make_plan("learned:sedac_data/sedac_gates.pth@0.25", loaded.decoder, loaded.identity)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sedac_cli.artifacts.gates_file import KINDS, GatesFile
from sedac_cli.artifacts.manifest import ModelIdentity
from sedac_cli.artifacts.thresholds import FROM_GATES_FILE, Thresholds
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Gate, Guards
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gates.learned import LearnedGate, Router
from sedac_cli.gates.probed import ProbeGate
from sedac_cli.gates.registry import FROM_FILES, build_gate, gate_from_thresholds, read_spec, read_thresholds
from sedac_cli.gates.span import SpanGate
from sedac_cli.probes import LREProbe
from sedac_cli.standins import StandIn, ZeroStandIn
from sedac_cli.standins.ghost import GhostKV
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns
from sedac_cli.structure import Decoder


@dataclass(frozen=True)
class Plan:
    gate: Gate
    standin: StandIn


def make_plan(
    spec: str, decoder: Decoder, identity: ModelIdentity | None = None, *, seed: int = 0, guards: Guards | None = None
) -> Plan:
    """From a spec. `NAME:FILE.pth@SHARE` reads what `sedac distill` made, `NAME:FILE.json` what `sedac calibrate` chose;
    `ghost:FILE.pth@GATE` skips whole layers; all others are gates with zero stand-ins."""
    check_spec(spec)
    name, _, argument = spec.partition(":")
    if name == "ghost":
        return plan_from_ghost(argument, decoder, identity, seed, guards)
    path, share = _path_and_share(argument)
    if name in KINDS and path.endswith(".pth"):
        return plan_from_gates(Path(path), name, share, decoder, identity, guards)
    if argument.endswith(".json") and name in FROM_GATES_FILE:
        thresholds = read_thresholds(Path(argument), name)
        if thresholds.gates_file is not None:
            return plan_from_thresholds(thresholds, Path(argument).parent, decoder, identity, guards)
    return Plan(build_gate(spec, decoder, guards=guards, seed=seed, identity=identity), ZeroStandIn())


def check_spec(spec: str) -> None:
    """Refuse what is wrong with a spec whatever the model, before one is loaded: its name, its options, a file that is not
    there. What is in a file, and whether it fits the model, `make_plan` finds."""
    name, _, argument = spec.partition(":")
    if name == "ghost":
        file, _, who = argument.partition("@")
        if not file:
            raise UsageError("ghost K and V need a file", hint=SpanGate.form)
        if who and not who.startswith("ghost"):
            check_spec(who)
        _require_file(file)
        return
    path, share = _path_and_share(argument)
    if name in KINDS and path.endswith(".pth"):
        _share(share, f"{name}:{path}")
        _require_file(path)
        return
    if name == "learned" and not argument.endswith(".json"):
        raise UsageError("gate 'learned' needs a file", hint="learned:sedac_data/sedac_gates.pth@0.25")
    name, argument, _ = read_spec(spec)
    if argument.endswith(".json") or name in FROM_FILES:
        _require_file(argument)


def _path_and_share(argument: str) -> tuple[str, str]:
    path, _, share = argument.rpartition("@") if "@" in argument else (argument, "", "")
    return path, share


def _share(text: str, gate: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise UsageError(f"'{text}' is not a share of MLPs to skip", hint=f"{gate}@0.25") from None


def _require_file(path: str) -> None:
    if not Path(path).exists():
        raise InputError(f"no such file: {path}")


def adapt(plan: Plan, rates: Sequence[float], calibration_steps: int = 50) -> AdaptiveThresholds:
    """Let the plan's probe gate find its thresholds while it runs, for these exit rates (one each, or one for all)."""
    gate = plan.gate
    if not isinstance(gate, ProbeGate):
        raise UsageError(f"gate '{gate.name}' has no thresholds to adapt", hint="fixed, cascade and soft have")
    rates = [*rates] * len(gate.checkpoints) if len(rates) == 1 else rates
    if len(rates) != len(gate.checkpoints):
        raise UsageError(f"{len(rates)} exit rates for {len(gate.checkpoints)} checkpoints {gate.checkpoints}")
    gate.adaptive = AdaptiveThresholds(dict(zip(gate.checkpoints, rates, strict=True)), calibration_steps)
    return gate.adaptive


def plan_from_ghost(
    argument: str, decoder: Decoder, identity: ModelIdentity | None, seed: int, guards: Guards | None
) -> Plan:
    """`FILE@GATE`: the gate says who skips the file's layers whole. Stand-ins of its own that it brings are not used."""
    file, _, who = argument.partition("@")
    ghost = GhostKV.load(Path(file), identity)
    told = ghost.recipe.get("options", {})
    if not who and str(told.get("gate", "")).startswith("random:"):
        who = told["gate"]
    if not who or who.startswith("ghost"):
        raise UsageError(f"who skips the layers of {file}?", hint=f"ghost:{file}@random:0.3, or another gate's spec")
    if ghost.hidden_size != decoder.hidden_size or ghost.last >= decoder.num_layers:
        raise InputError(
            f"{file} is for states of width {ghost.hidden_size} and layers up to {ghost.last}; "
            f"the model has width {decoder.hidden_size} and {decoder.num_layers} layers"
        )
    if guards is None and who.startswith(("random:", "always:")):
        guards = Guards(sinks=told.get("sinks", 0))
    gate = make_plan(who, decoder, identity, seed=seed, guards=guards).gate
    return Plan(SpanGate(gate, ghost.layers), ghost)


def plan_from_thresholds(
    thresholds: Thresholds,
    folder: Path,
    decoder: Decoder,
    identity: ModelIdentity | None = None,
    guards: Guards | None = None,
) -> Plan:
    """The gate of a thresholds file as it was calibrated; files it names are looked for from `folder`."""
    if identity is not None:
        thresholds.model.require_same(identity, f"the thresholds in {folder}")
    if thresholds.gates_file is None:
        return Plan(gate_from_thresholds(thresholds, folder, decoder, guards=guards), ZeroStandIn())
    thresholds.gates_file.verify(folder, "gates file")
    path = folder / thresholds.gates_file.file
    found = _read_gates(path, thresholds.gate, identity)
    guards = guards or Guards(**thresholds.guards.model_dump())
    if found.decided_by is not None:
        return plan_given(found, path, decoder, guards, thresholds.parameters)
    if "limit" not in thresholds.parameters:
        raise InputError(f"{path} was trained with its gate: the thresholds in {folder} name no limit for it")
    return plan_at(found, path, float(thresholds.parameters["limit"]), decoder, guards)


def plan_from_gates(
    path: Path, name: str, share: str, decoder: Decoder, identity: ModelIdentity | None, guards: Guards | None
) -> Plan:
    found = _read_gates(path, name, identity)
    if found.decided_by is not None:
        if share:
            raise UsageError(
                f"the stand-ins of {path} are for a gate whose own thresholds decide: it has no shares to choose from",
                hint=f"{name}:{path}",
            )
        return plan_given(found, path, decoder, guards)
    told = _share(share, f"{name}:{path}")
    wanted = float(found.recipe["options"]["target_skip"]) if told is None else told
    return plan_at(found, path, found.limit_for(wanted), decoder, guards)


def _read_gates(path: Path, name: str, identity: ModelIdentity | None) -> GatesFile:
    found = GatesFile.read(path)
    if found.kind != name:
        raise UsageError(f"{path} holds gate '{found.kind}', not '{name}'", hint=f"{found.kind}:{path}")
    if identity is not None:
        found.model.require_same(identity, str(path))
    return found


def plan_at(found: GatesFile, path: Path, limit: float, decoder: Decoder, guards: Guards | None = None) -> Plan:
    """The gate of a gates file with this limit on its scores, and its stand-ins."""
    guards = guards or Guards(sinks=found.sinks)
    standin = LowRankStandIns({layer: _load_standin(state) for layer, state in found.standins.items()})
    if found.kind == "learned":
        routers = {layer: _load_router(state, decoder, path) for layer, state in found.routers.items()}
        return Plan(LearnedGate(decoder.num_layers, routers, limit, guards), standin)
    probes = {layer: _load_probe(state) for layer, state in found.routers.items()}
    threshold = float(torch.nn.functional.softplus(torch.tensor(-limit)))
    last = decoder.num_layers - 1 - max(found.standins)
    guards = Guards(guards.sinks, guards.first, max(guards.last, last), guards.prefill, guards.decode)
    return Plan(CascadeGate(decoder.num_layers, probes, dict.fromkeys(probes, threshold), guards=guards), standin)


def plan_given(
    found: GatesFile, path: Path, decoder: Decoder, guards: Guards | None = None, knobs: Mapping[str, Any] | None = None
) -> Plan:
    """A gate that stayed as it was, and the stand-ins trained for it. `knobs`: `tighten`, a factor on its thresholds, or
    options of its own that go before those it was trained under."""
    told = Thresholds.model_validate(found.decided_by)
    own = {key: value for key, value in (knobs or {}).items() if key in told.parameters}
    factor = float((knobs or {}).get("tighten", 1.0))
    told = told.model_copy(
        update={"parameters": told.parameters | own, "thresholds": [factor * value for value in told.thresholds]}
    )
    probes = {layer: _load_probe(state) for layer, state in found.routers.items()}
    for layer, probe in probes.items():
        if probe.hidden_size != decoder.hidden_size:
            raise InputError(
                f"{path}: the probe of layer {layer} reads width {probe.hidden_size}, the model's is {decoder.hidden_size}"
            )
    gate = gate_from_thresholds(told, path.parent, decoder, guards=guards, probes=probes)
    return Plan(gate, LowRankStandIns({layer: _load_standin(state) for layer, state in found.standins.items()}))


def _load_router(state: dict[str, torch.Tensor], decoder: Decoder, path: Path) -> Router:
    width = state["weight"].shape[0]
    if width != decoder.hidden_size:
        raise InputError(f"{path}: routers of width {width}, the model's states are {decoder.hidden_size} wide")
    missing = Router(width, 0).state_dict().keys() - state.keys()
    if missing:
        raise InputError(f"{path}: a router lacks {', '.join(sorted(missing))}", hint="sedac distill makes a new file")
    router = Router(width, state["outer"].shape[0])
    router.load_state_dict(state)
    return router.requires_grad_(False)


def _load_probe(state: dict[str, torch.Tensor]) -> LREProbe:
    rank, width = state["proj.weight"].shape
    probe = LREProbe(width, rank)
    probe.load_state_dict(state)
    return probe.eval().requires_grad_(False)


def _load_standin(state: dict[str, torch.Tensor]) -> LowRank:
    rank, width = state["a"].shape
    module = LowRank(width, rank)
    module.load_state_dict({key: value.float() for key, value in state.items()})
    return module.requires_grad_(False)
