"""Gates by name, and the one-line specs users write: `never`, `always:14`, `random:0.3`, `cascade:thresholds.json`.

gate = build_gate("cascade:sedac_data/thresholds.json", decoder)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sedac_cli.errors import UsageError, did_you_mean
from sedac_cli.gates.base import Gate, Guards
from sedac_cli.gates.cascade import CascadeGate, FixedGate
from sedac_cli.gates.simple import AlwaysGate, NeverGate, RandomGate
from sedac_cli.probes import load_probe

if TYPE_CHECKING:
    from sedac_cli.artifacts.manifest import ModelIdentity
    from sedac_cli.artifacts.thresholds import Thresholds
    from sedac_cli.structure import Decoder

GATES: dict[str, type[Gate]] = {g.name: g for g in (NeverGate, AlwaysGate, RandomGate, FixedGate, CascadeGate)}


def build_gate(
    spec: str,
    decoder: Decoder,
    *,
    guards: Guards | None = None,
    seed: int = 0,
    identity: ModelIdentity | None = None,
) -> Gate:
    """A gate from its spec. Gates with thresholds take a file; its guards hold unless others are given, and a file
    made for a model other than `identity` is refused."""
    name, _, argument = spec.partition(":")
    if name not in GATES:
        raise UsageError(
            f"there is no gate '{name}'.{did_you_mean(name, list(GATES))}", hint="gates: " + ", ".join(GATES)
        )
    layers = decoder.num_layers
    if name == "never":
        return NeverGate(layers, guards)
    if not argument:
        form = {"always": "always:14", "random": "random:0.3"}.get(name, f"{name}:sedac_data/thresholds.json")
        raise UsageError(f"gate '{name}' needs an argument", hint=form)
    if name == "always":
        return AlwaysGate(layers, int(_number(argument, spec, whole=True)), guards)
    if name == "random":
        return RandomGate(layers, _number(argument, spec), seed, guards)

    from sedac_cli.artifacts.thresholds import Thresholds

    found = Thresholds.read(Path(argument))
    if found.gate != name:
        raise UsageError(f"{argument} is for gate '{found.gate}', not '{name}'", hint=f"{found.gate}:{argument}")
    if identity is not None:
        found.model.require_same(identity, argument)
    return gate_from_thresholds(found, Path(argument).parent, decoder, guards=guards)


def gate_from_thresholds(
    thresholds: Thresholds, folder: Path, decoder: Decoder, *, guards: Guards | None = None
) -> Gate:
    """The gate a thresholds file describes, with its probes from the same folder, checked against the model's width."""
    probes = {}
    for layer, probe in thresholds.probes.items():
        probe.verify(folder)
        probes[layer] = load_probe(folder / probe.file, decoder.hidden_size)
    guards = guards or Guards(**thresholds.guards.model_dump())
    kind = {"fixed": FixedGate, "cascade": CascadeGate}[thresholds.gate]
    return kind(decoder.num_layers, probes, thresholds.by_layer, thresholds.batch_rule, guards)


def _number(text: str, spec: str, whole: bool = False) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise UsageError(f"gate '{spec}': '{text}' is not a number") from None
