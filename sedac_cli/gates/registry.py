"""Gates by name, and the one-line specs users write: `never`, `always:14`, `stability:tau=0.9,k=3`, `cascade:FILE`.

gate = build_gate("cascade:sedac_data/thresholds.json", decoder)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedac_cli.errors import InputError, UsageError, did_you_mean
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Gate, Guards
from sedac_cli.gates.cascade import CascadeGate, FixedGate
from sedac_cli.gates.entropy import EntropyGate
from sedac_cli.gates.learned import LearnedGate
from sedac_cli.gates.lens import HeadLens, Lens, ProbeLens
from sedac_cli.gates.options import check_options, parse_options
from sedac_cli.gates.simple import AlwaysGate, NeverGate, RandomGate
from sedac_cli.gates.soft import SoftGate
from sedac_cli.gates.stability import StabilityGate
from sedac_cli.probes import LREProbe, load_probe, probe_name

if TYPE_CHECKING:
    from sedac_cli.artifacts.manifest import ModelIdentity
    from sedac_cli.artifacts.thresholds import Thresholds
    from sedac_cli.structure import Decoder

GATES: dict[str, type[Gate]] = {
    g.name: g
    for g in (
        NeverGate,
        AlwaysGate,
        RandomGate,
        FixedGate,
        CascadeGate,
        SoftGate,
        StabilityGate,
        EntropyGate,
        LearnedGate,
    )
}


def build_gate(
    spec: str,
    decoder: Decoder,
    *,
    guards: Guards | None = None,
    seed: int = 0,
    identity: ModelIdentity | None = None,
    adaptive: AdaptiveThresholds | None = None,
) -> Gate:
    """A gate from its spec. `guards` go before those of a spec or file; `adaptive` before the thresholds of a file;
    a file made for a model other than `identity` is refused."""
    name, argument, values = read_spec(spec)
    if adaptive is not None and name not in ("fixed", "cascade", "soft"):
        raise UsageError(f"gate '{name}' has no thresholds to adapt", hint="fixed, cascade and soft have")
    layers = decoder.num_layers
    if argument.endswith(".json") or name in FROM_FILES:
        return _gate_from_file(name, Path(argument), decoder, guards, identity, adaptive)
    if name == "never":
        return NeverGate(layers, guards)
    if name == "stability":
        own = Guards(**{key: values.pop(key) for key in ("sinks", "first", "last")})
        return StabilityGate(layers, **values, guards=guards or own)
    if name == "entropy":
        return entropy_gate(values, decoder, guards)
    if name == "always":
        return AlwaysGate(layers, values["layer"], guards)
    return RandomGate(layers, values["probability"], seed, guards)


FROM_FILES = ("fixed", "cascade", "soft")
"""Gates whose argument is always a file."""


def read_spec(spec: str) -> tuple[str, str, dict[str, Any]]:
    """(name, argument, checked options): what is wrong with a spec whatever the model is refused here. Files are not opened."""
    name, _, argument = (part.strip() for part in spec.partition(":"))
    if name not in GATES:
        raise UsageError(
            f"there is no gate '{name}'.{did_you_mean(name, list(GATES))}", hint="gates: " + ", ".join(GATES)
        )
    if argument.endswith(".json"):
        return name, argument, {}
    if name == "never" and argument:
        raise UsageError(f"gate 'never' takes no argument, not '{argument}'")
    if name in ("stability", "entropy"):
        return name, argument, parse_options(argument, GATES[name].options, f"gate '{name}'")
    if name == "learned":
        raise UsageError("gate 'learned' comes with stand-ins: it is loaded by runtime.plan.make_plan")
    if name != "never" and not argument:
        raise UsageError(f"gate '{name}' needs an argument", hint=GATES[name].form)
    if name == "always":
        return name, argument, {"layer": int(_number(argument, spec, whole=True))}
    if name == "random":
        probability = _number(argument, spec)
        RandomGate(1, probability)  # says what is no probability, for a model of any depth
        return name, argument, {"probability": probability}
    return name, argument, {}


def _gate_from_file(
    name: str, path: Path, decoder: Decoder, guards: Guards | None, identity: ModelIdentity | None,
    adaptive: AdaptiveThresholds | None,
) -> Gate:  # fmt: skip
    found = read_thresholds(path, name)
    if identity is not None:
        found.model.require_same(identity, str(path))
    return gate_from_thresholds(found, path.parent, decoder, guards=guards, adaptive=adaptive)


def read_thresholds(path: Path, name: str) -> Thresholds:
    """A thresholds file that is for the gate of that name."""
    from sedac_cli.artifacts.thresholds import Thresholds

    found = Thresholds.read(path)
    if found.gate != name:
        raise UsageError(f"{path} is for gate '{found.gate}', not '{name}'", hint=f"{found.gate}:{path}")
    return found


def gate_from_thresholds(
    thresholds: Thresholds,
    folder: Path,
    decoder: Decoder,
    *,
    guards: Guards | None = None,
    adaptive: AdaptiveThresholds | None = None,
    probes: dict[int, LREProbe] | None = None,
) -> Gate:
    """The gate a thresholds file describes, with its probes from the same folder, checked against the model's width, or
    with those given."""
    if thresholds.gates_file is not None:
        raise UsageError(
            f"gate '{thresholds.gate}' of {thresholds.gates_file.file} comes with stand-ins: it cannot run without them",
            hint="runtime.plan.make_plan gives both",
        )
    if not thresholds.probes:
        return _gate_from_parameters(thresholds, decoder, guards or Guards(**thresholds.guards.model_dump()))
    if probes is None:
        probes = {}
        for layer, probe in thresholds.probes.items():
            probe.verify(folder)
            probes[layer] = load_probe(folder / probe.file, decoder.hidden_size)
    guards = guards or Guards(**thresholds.guards.model_dump())
    where = f"the file of gate '{thresholds.gate}'"
    told = dict(thresholds.parameters)
    written = told.pop("adaptive", None)
    if adaptive is None and written is not None:
        adaptive = _adaptive(written, thresholds.layers, where)
    limits = adaptive or thresholds.by_layer
    soft = [option for option in SoftGate.options if option.name != "thresholds"]
    told = check_options(told, soft if thresholds.gate == "soft" else (), where)
    if thresholds.gate == "soft":
        return SoftGate(decoder.num_layers, probes, limits, **told, guards=guards)
    kind = {"fixed": FixedGate, "cascade": CascadeGate}[thresholds.gate]
    return kind(decoder.num_layers, probes, limits, thresholds.batch_rule, guards)


def _gate_from_parameters(thresholds: Thresholds, decoder: Decoder, guards: Guards) -> Gate:
    """The gates that read nothing but their options."""
    name, layers, told = thresholds.gate, decoder.num_layers, dict(thresholds.parameters)
    where = f"the file of gate '{name}'"
    if name == "random":
        seed = int(told.pop("seed", 0))
        return RandomGate(layers, check_options(told, RandomGate.options, where)["probability"], seed, guards)
    values = check_options(told, GATES[name].options, where)
    if name == "never":
        return NeverGate(layers, guards)
    if name == "always":
        return AlwaysGate(layers, values["layer"], guards)
    if name == "stability":
        return StabilityGate(layers, tau=values["tau"], k=values["k"], min_layer=values["min_layer"], guards=guards)
    return entropy_gate(values, decoder, guards)


def _adaptive(written: Any, layers: list[int], where: str) -> AdaptiveThresholds:
    if not isinstance(written, Mapping):
        raise InputError(f"{where}: adaptive is {type(written).__name__}, expected its options by name")
    values = check_options(written, AdaptiveThresholds.options, f"{where}, adaptive,")
    rates = values.pop("rates")
    if len(rates) != len(layers):
        raise InputError(f"{where}: {len(rates)} adaptive rates for {len(layers)} layers")
    return AdaptiveThresholds(dict(zip(layers, rates, strict=True)), **values)


def entropy_checks(values: Mapping[str, Any], decoder: Decoder, guards: Guards) -> list[int]:
    """The layers an entropy gate with these options checks."""
    if values["checks"] is not None:
        return [_whole(number, "gate 'entropy': checks") for number in values["checks"]]
    rule = {key: values[key] for key in ("threshold", "anchor_interval", "min_exit_layer")}
    return EntropyGate.default_checks(decoder.num_layers, guards=guards, **rule)


def make_lens(name: str, decoder: Decoder, checks: list[int]) -> Lens:
    """`head`, or a folder of probes of the entropy."""
    if name == "head":
        return HeadLens(decoder)
    folder = Path(name)
    if not folder.is_dir():
        raise UsageError(f"gate 'entropy': lens is 'head' or a folder of probes, not '{folder}'")
    return ProbeLens({layer: load_probe(folder / probe_name(layer), decoder.hidden_size) for layer in checks})


def entropy_gate(values: Mapping[str, Any], decoder: Decoder, guards: Guards | None = None) -> EntropyGate:
    """From its options, `mean` and `sd` among them."""
    guards = guards or Guards(sinks=values["sinks"], first=values["first"], last=values["last"])
    rule = {key: values[key] for key in ("threshold", "anchor_interval", "min_exit_layer")}
    checks = entropy_checks(values, decoder, guards)
    mean, sd = (_per_check(values[name], checks, name) for name in ("mean", "sd"))
    lens = make_lens(values["lens"], decoder, checks)
    return EntropyGate(decoder.num_layers, lens, mean, sd, **rule, checks=checks, guards=guards)


def _per_check(values: list[float], checks: list[int], name: str) -> float | dict[int, float]:
    if len(values) == 1:
        return values[0]
    if len(values) != len(checks):
        raise UsageError(
            f"gate 'entropy': {len(values)} values of {name} for {len(checks)} checks",
            hint=f"one for all, or one each for layers {'/'.join(map(str, checks)) or '(none)'}",
        )
    return dict(zip(checks, values, strict=True))


def _whole(number: float, where: str) -> int:
    if number != int(number):
        raise UsageError(f"{where}: {number} is not a layer")
    return int(number)


def _number(text: str, spec: str, whole: bool = False) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise UsageError(f"gate '{spec}': '{text}' is not a number") from None
