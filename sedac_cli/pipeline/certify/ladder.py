"""The settings of a gate from strict to loose: the order in which they are tested, fixed before any harm is seen.

Always true: a rung *is* a thresholds file, so what is certified is run by the code that later loads it; and the rungs depend
on the collected text, the gate and its options alone, never on the calibration sequences.

    ladder = make_ladder("cascade", Site(decoder, identity, Guards(sinks=4), Path("sedac_data"), Path("sedac_data")))
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sedac_cli.artifacts.files import sha256_file
from sedac_cli.artifacts.gates_file import GatesFile
from sedac_cli.artifacts.manifest import MANIFEST, ModelIdentity
from sedac_cli.artifacts.thresholds import FROM_GATES_FILE, PROBED, GuardSettings, ProbeFile, Promise, Thresholds
from sedac_cli.errors import UsageError, did_you_mean
from sedac_cli.gates.base import Guards, check_layers, stricter
from sedac_cli.gates.options import parse_options
from sedac_cli.gates.registry import entropy_checks
from sedac_cli.gates.soft import SoftGate
from sedac_cli.gates.stability import GUARD_OPTIONS, StabilityGate
from sedac_cli.pipeline.calibrate import CalibrateOptions, collected_risks, find_thresholds, open_probes, probe_file
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.pipeline.lens import MEASURED, collected_batches, entropy_options, measure_entropy_gate
from sedac_cli.probes import probe_name
from sedac_cli.structure import Decoder

RATES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
"""Target exit rates per checkpoint."""
TAUS = (0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.5)
ENTROPY_THRESHOLDS = tuple(round(1.15 - 0.05 * step, 2) for step in range(20))
TIGHTEN = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)
"""Factors on the thresholds that stand-ins were trained under."""
PROBABILITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
SHARES = 16
"""Points along the measured curve of a gates file."""
GATES = ("fixed", "cascade", "soft", "learned", "stability", "entropy", "always", "random")


@dataclass(frozen=True)
class Site:
    """What a ladder is built for. `seen_from` is the folder of the file to write: other files are named from there."""

    decoder: Decoder
    identity: ModelIdentity
    guards: Guards
    folder: Path
    seen_from: Path
    layers: tuple[int, ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Rung:
    setting: dict[str, Any]
    thresholds: Thresholds


@dataclass(frozen=True)
class Ladder:
    gate: str
    rungs: list[Rung]
    never: Thresholds
    """The answer when nothing can be certified."""


def make_ladder(spec: str, site: Site) -> Ladder:
    """From `cascade`, `soft:decay=0.7`, `learned:FILE.pth`, `stability:k=2`, `entropy:mean=6,sd=2`, `always`, `random`."""
    name, _, argument = (part.strip() for part in spec.partition(":"))
    if name not in GATES:
        raise UsageError(
            f"there is no gate '{name}' to certify.{did_you_mean(name, list(GATES))}", hint=", ".join(GATES)
        )
    if argument.partition("@")[0].endswith(".pth") and name in FROM_GATES_FILE:
        return _from_gates_file(name, argument, site)
    if name == "learned":
        raise UsageError("gate 'learned' needs a file", hint="--gate learned:sedac_data/sedac_gates.pth")
    if name in PROBED:
        return _from_probes(name, argument, site)
    makers: dict[str, Callable[[str, Site], Ladder]] = {
        "stability": _stability, "entropy": _entropy, "always": _always, "random": _random,
    }  # fmt: skip
    return makers[name](argument, site)


def draft(name: str, site: Site, guards: Guards, **values: Any) -> Thresholds:
    """A thresholds file that promises nothing yet."""
    filled: dict[str, Any] = {"layers": [], "thresholds": [], "probes": {}, "target_label": "none"} | values
    promise = Promise(kind="certified", target={})
    return Thresholds(
        gate=name, guards=GuardSettings(**asdict(guards)), found_by={}, promise=promise, model=site.identity, **filled  # type: ignore[arg-type]
    )  # fmt: skip


def _from_probes(name: str, argument: str, site: Site) -> Ladder:
    told = parse_options(argument, SoftGate.options[1:] if name == "soft" else (), f"gate '{name}'")
    parameters = {key: value for key, value in told.items() if value is not None}
    data, probes = open_probes(site.folder, site.layers)
    data.manifest.model.require_same(site.identity, str(site.folder))
    if name == "fixed" and len(data.layers) != 1:
        raise UsageError(f"gate 'fixed' has one checkpoint, not {len(data.layers)}", hint=f"--layers {data.layers[-1]}")
    options = CalibrateOptions(guards=site.guards)
    risks = collected_risks(data, probes)
    files = {layer: probe_file(site.folder / probe_name(layer), site.seen_from) for layer in data.layers}

    def at(limits: list[float]) -> Thresholds:
        return draft(
            name, site, site.guards, layers=list(data.layers), thresholds=limits, probes=files,
            parameters=parameters, target_label=data.target,
        )  # fmt: skip

    limits = [0.0] * len(data.layers)
    rungs = []
    for rate in RATES:
        found = find_thresholds(data, risks, (rate,) * len(data.layers), options)
        # A looser rung lets go of more at the first checkpoints, which may leave a harder rest behind: never tighten.
        limits = [max(before, found[layer]) for before, layer in zip(limits, data.layers, strict=True)]
        rungs.append(Rung({"rate": rate, "thresholds": limits}, at(limits)))
    return Ladder(name, rungs, at([0.0] * len(data.layers)))


def _from_gates_file(name: str, argument: str, site: Site) -> Ladder:
    file, _, most = argument.partition("@")
    path = Path(file)
    gates = GatesFile.read(path)
    if gates.kind != name:
        raise UsageError(f"{path} holds gate '{gates.kind}', not '{name}'", hint=f"{gates.kind}:{path}")
    gates.model.require_same(site.identity, str(path))
    if gates.decided_by is not None:
        return _from_given(name, path, most, gates, site)
    measured = [row["share"] for row in gates.curve]
    try:
        top = float(most) if most else max(measured)
    except ValueError:
        raise UsageError(f"'{most}' is not a share of MLPs to skip", hint=f"{name}:{path}@0.5") from None
    gates.limit_for(top)
    guards = stricter(site.guards, Guards(sinks=gates.sinks))
    digest = ProbeFile(file=os.path.relpath(path, site.seen_from), sha256=sha256_file(path))
    rungs = []
    for share in np.unique(np.linspace(min(measured), top, SHARES)).tolist():
        setting = {"share": round(share, 4), "limit": gates.limit_for(min(share, top))}
        rungs.append(Rung(setting, draft(name, site, guards, parameters=setting, gates_file=digest)))
    return Ladder(name, rungs, _never(site))


def _from_given(name: str, path: Path, most: str, gates: GatesFile, site: Site) -> Ladder:
    """Stand-ins of a gate that stayed as it was: its thresholds times a factor, or its own option, from strict to loose."""
    if most:
        raise UsageError(f"{path} holds a gate whose own thresholds decide: no share", hint=f"{name}:{path}")
    told = Thresholds.model_validate(gates.decided_by)
    guards = stricter(site.guards, Guards(**told.guards.model_dump()))
    digest = ProbeFile(file=os.path.relpath(path, site.seen_from), sha256=sha256_file(path))
    knob, values = ("tau", TAUS) if name == "stability" else ("tighten", TIGHTEN)
    return Ladder(
        name,
        [Rung({knob: x}, draft(name, site, guards, parameters={knob: x}, gates_file=digest)) for x in values],
        _never(site),
    )


def _stability(argument: str, site: Site) -> Ladder:
    told = parse_options(argument, StabilityGate.options, "gate 'stability'")
    guards = stricter(site.guards, Guards(**{option.name: told.pop(option.name) for option in GUARD_OPTIONS}))
    taus = [tau for tau in TAUS if "tau" not in argument or tau >= told["tau"]]
    return _by_option("stability", site, guards, told, "tau", taus)


def _entropy(argument: str, site: Site) -> Ladder:
    """Mean and sd that are left out are measured on the collected text, at the layers that the loosest setting checks."""
    told = entropy_options(argument)
    guards = stricter(site.guards, Guards(**{option.name: told.pop(option.name) for option in GUARD_OPTIONS}))
    limits = [limit for limit in ENTROPY_THRESHOLDS if "threshold" not in argument or limit >= told["threshold"]]
    missing = [name for name in MEASURED if told[name] is None]
    if len(missing) == 1:
        raise UsageError(f"gate 'entropy' needs {missing[0]} too", hint="both, or neither: then they are measured")
    if not missing or not limits:
        told = {key: value for key, value in told.items() if value is not None}
        return _by_option("entropy", site, guards, told, "threshold", limits)
    if not (site.folder / MANIFEST).exists():
        raise UsageError(
            f"gate 'entropy' needs mean and sd, and {site.folder} holds no text to measure them on",
            hint="sedac collect, or --gate entropy:mean=6,sd=2",
        )
    batches = collected_batches(CollectedData.open(site.folder))
    filled, _ = measure_entropy_gate(told | {"threshold": min(limits)}, site.decoder, guards, batches)
    of_check = dict(zip(filled["checks"], zip(filled["mean"], filled["sd"], strict=True), strict=True))
    rungs = []
    for limit in limits:
        checks = entropy_checks(told | {"threshold": limit}, site.decoder, guards)
        own = {"checks": checks, "mean": [of_check[x][0] for x in checks], "sd": [of_check[x][1] for x in checks]}
        parameters = {key: value for key, value in told.items() if value is not None} | own | {"threshold": limit}
        rungs.append(Rung({"threshold": limit}, draft("entropy", site, guards, parameters=parameters)))
    return Ladder("entropy", rungs, _never(site))


def _always(argument: str, site: Site) -> Ladder:
    """`always:l` goes no shallower than l."""
    last = site.decoder.num_layers - 1
    shallowest = int(_number(argument, "always", 0))
    check_layers([shallowest], last + 1, "gate 'always'")
    return _by_option("always", site, site.guards, {}, "layer", list(range(last, shallowest - 1, -1)))


def _random(argument: str, site: Site) -> Ladder:
    """`random:p` goes no higher than p."""
    most = _number(argument, "random", 1.0)
    chances = [chance for chance in PROBABILITIES if chance <= most]
    return _by_option("random", site, site.guards, {"seed": site.seed}, "probability", chances)


def _by_option(name: str, site: Site, guards: Guards, told: dict[str, Any], option: str, values: list[Any]) -> Ladder:
    if not values:
        raise UsageError(f"gate '{name}': no setting as strict as that is tried", hint=f"leave {option} out")
    rungs = [Rung({option: value}, draft(name, site, guards, parameters=told | {option: value})) for value in values]
    return Ladder(name, rungs, _never(site))


def _never(site: Site) -> Thresholds:
    return draft("never", site, site.guards)


def _number(text: str, name: str, default: float) -> float:
    try:
        return float(text) if text else default
    except ValueError:
        raise UsageError(f"gate '{name}:{text}': '{text}' is not a number") from None
