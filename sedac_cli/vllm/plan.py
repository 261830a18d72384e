"""From settings to a gate and its stand-ins, checked against the model before vLLM loads a weight of it.

shape = ModelShape.of(vllm_config.model_config)
plan = build_plan(settings, shape)
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedac_cli.artifacts.files import sha256_file
from sedac_cli.artifacts.manifest import MANIFEST, Manifest, ModelIdentity
from sedac_cli.artifacts.thresholds import Thresholds
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Gate, Guards
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gates.registry import build_gate
from sedac_cli.models import ARCHITECTURE_KEYS
from sedac_cli.probes import load_probe, probe_name
from sedac_cli.runtime.plan import Plan, make_plan
from sedac_cli.standins import ZeroStandIn
from sedac_cli.vllm.forced import ForcedGate
from sedac_cli.vllm.settings import Settings

log = logging.getLogger("sedac")


@dataclass(frozen=True)
class ModelShape:
    """What a gate needs to know of the model it is for; vLLM splits and fuses the rest beyond recognition."""

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    architecture: dict[str, Any]

    @classmethod
    def of(cls, model_config: Any) -> ModelShape:
        config = model_config.hf_text_config
        return cls(
            name=str(model_config.model),
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            architecture={key: getattr(config, key, None) for key in ARCHITECTURE_KEYS},
        )

    def require(self, made_for: ModelIdentity, what: str) -> None:
        """The artifact's model has this architecture; the first difference is named with both values."""
        for key, theirs in made_for.architecture.items():
            mine = self.architecture.get(key)
            if mine != theirs:
                raise InputError(
                    f"{what} is for another model: {key} is {theirs} there ({made_for.ref}) and {mine} here ({self.name})"
                )


def build_plan(settings: Settings, shape: ModelShape) -> Plan:
    """The gate in force, on the CPU."""
    guards = _guards(settings)
    if settings.gate is None:
        return Plan(_probes_of_folder(settings, shape, guards), ZeroStandIn())
    name, _, argument = settings.gate.partition(":")
    if name == ForcedGate.name:
        return Plan(ForcedGate.parse(argument, shape.num_layers, guards), ZeroStandIn())
    for path in artifact_files(settings):
        _require_model(path, shape)
    decoder: Any = _Decoder(shape)
    if "adaptive" in settings.given and settings.adaptive:
        layers = Thresholds.read(Path(argument)).layers if argument.endswith(".json") else []
        gate = build_gate(
            settings.gate, decoder, guards=guards, seed=settings.seed, adaptive=_adaptive(settings, layers)
        )
        return Plan(gate, ZeroStandIn())
    return make_plan(settings.gate, decoder, seed=settings.seed, guards=guards)


class _Decoder:
    """What the registry reads of a `structure.Decoder`. vLLM's output head is split over GPUs: no lens looks through it."""

    def __init__(self, shape: ModelShape):
        self.num_layers, self.hidden_size, self.vocab_size = shape.num_layers, shape.hidden_size, shape.vocab_size

    def __getattr__(self, name: str) -> Any:
        raise UsageError(
            "gate 'entropy' with lens=head reads the output head at every check, which vLLM does not allow",
            hint="entropy:lens=FOLDER,... reads trained probes",
        )


def _guards(settings: Settings) -> Guards | None:
    """Guards that were asked for; None leaves them to the artifact."""
    named = (settings.sinks, settings.protect_first, settings.protect_last, settings.phase)
    if all(value is None for value in named):
        return None
    phase = settings.phase or "both"
    return Guards(
        sinks=settings.sinks or 0, first=settings.protect_first or 0, last=settings.protect_last or 0,
        prefill=phase != "decode", decode=phase != "prefill",
    )  # fmt: skip


def _probes_of_folder(settings: Settings, shape: ModelShape, guards: Guards | None) -> Gate:
    """The cascade of the SEDAC_PROBE_ variables."""
    folder, layers = Path(settings.probe_dir), settings.probe_layers
    if not folder.is_dir():
        raise InputError(f"SEDAC_PROBE_DIR: there is no folder {folder}", hint="sedac collect, then sedac train-probes")
    if (folder / MANIFEST).is_file():
        shape.require(Manifest.read(folder).model, str(folder))
    else:
        log.warning("%s holds no %s: only the width of its probes was checked", folder, MANIFEST)
    probes = {layer: load_probe(folder / probe_name(layer), shape.hidden_size) for layer in layers}
    for layer, probe in probes.items():
        if "probe_rank" in settings.given and probe.rank != settings.probe_rank:
            raise InputError(
                f"{folder / probe_name(layer)} has rank {probe.rank}, SEDAC_PROBE_RANK is {settings.probe_rank}"
            )
    if settings.adaptive:
        return CascadeGate(shape.num_layers, probes, _adaptive(settings, layers), guards=guards)
    values = settings.thresholds
    if values is None:
        path = folder / "thresholds.json"
        if not path.is_file():
            raise UsageError("SEDAC_ADAPTIVE=0 needs SEDAC_THRESHOLDS", hint=f"or sedac calibrate --data-dir {folder}")
        found = Thresholds.read(path).by_layer
        if missing := [layer for layer in layers if layer not in found]:
            raise InputError(
                f"{path} has no threshold for layers {missing}", hint=f"SEDAC_PROBE_LAYERS={','.join(map(str, found))}"
            )
        values = [found[layer] for layer in layers]
    return CascadeGate(shape.num_layers, probes, dict(zip(layers, values, strict=True)), guards=guards)


def _adaptive(settings: Settings, layers: list[int]) -> AdaptiveThresholds:
    if len(settings.exit_rates) != len(layers):
        raise UsageError(f"SEDAC_EXIT_RATES: {len(settings.exit_rates)} rates for {len(layers)} layers")
    return AdaptiveThresholds(
        dict(zip(layers, settings.exit_rates, strict=True)), calibration_steps=settings.calibration_steps
    )


def artifact_files(settings: Settings) -> list[Path]:
    """The files that a plan of these settings reads."""
    if settings.gate is not None:
        _, _, argument = settings.gate.partition(":")
        path = Path(argument.rpartition("@")[0] if "@" in argument else argument)
        if path.suffix not in (".pth", ".json"):
            return []
        if not path.is_file():
            raise InputError(f"gate '{settings.gate}': there is no file {path}")
        beside = Thresholds.read(path) if path.suffix == ".json" else None
        named = [] if beside is None else [p.file for p in beside.probes.values()]
        if beside is not None and beside.gates_file is not None:
            named.append(beside.gates_file.file)
        return [path, *(path.parent / name for name in named)]
    folder = Path(settings.probe_dir)
    return [p for p in (folder / probe_name(layer) for layer in settings.probe_layers) if p.is_file()]


def artifacts_digest(settings: Settings) -> str:
    hashes = [sha256_file(path) for path in artifact_files(settings) if path.is_file()]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16] if hashes else ""


def _require_model(path: Path, shape: ModelShape) -> None:
    if path.suffix == ".json":
        shape.require(Thresholds.read(path).model, str(path))
    elif not path.name.startswith("sedac_probe_layer"):
        from sedac_cli.artifacts.gates_file import GatesFile

        shape.require(GatesFile.read(path).model, str(path))
