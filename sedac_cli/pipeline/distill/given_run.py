"""`distill --gate SPEC` as the command runs it: the gate stays, stand-ins are trained for it, one file holds both.

report = distill_given(loaded, text, GivenOptions(gate="soft:sedac_data/thresholds.json", minutes=4), out)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from sedac_cli.artifacts.files import folder_lock, make_folder
from sedac_cli.artifacts.gates_file import GatesFile
from sedac_cli.artifacts.thresholds import Thresholds
from sedac_cli.config import TextSpec
from sedac_cli.costs import branch_flops
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.base import Gate
from sedac_cli.gates.entropy import EntropyGate
from sedac_cli.gates.options import parse_options
from sedac_cli.gates.probed import ProbeGate
from sedac_cli.gates.registry import build_gate, gate_from_thresholds, read_thresholds
from sedac_cli.gates.stability import GUARD_OPTIONS
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.distill.given import GivenOptions, GivenTrainer, as_standins, measure_given
from sedac_cli.pipeline.distill.loop import exported
from sedac_cli.pipeline.distill.run import open_state, read_windows, split
from sedac_cli.pipeline.world import World
from sedac_cli.standins import StandIn, ZeroStandIn

ZERO, LINEAR, TRAINED = "zero", "linear start", "trained"


@dataclass(frozen=True)
class GivenReport:
    file: Path
    gate: str
    layers: list[int]
    steps: int
    tokens: int
    seconds: float
    standin_cost: float
    """FLOPs of a stand-in, of those of its MLP."""
    held_windows: int
    ways: dict[str, dict[str, float]]


def read_gate(spec: str, loaded: LoadedModel, seed: int = 0) -> tuple[Gate, Thresholds]:
    """The gate of a spec, and the document that describes it wholly."""
    name, _, argument = (part.strip() for part in spec.partition(":"))
    if name == "never":
        raise UsageError("gate 'never' skips nothing: it needs no stand-ins")
    if argument.partition("@")[0].endswith(".pth"):
        raise UsageError(f"gate '{spec}' has stand-ins already", hint="cascade:sedac_data/thresholds.json")
    if argument.endswith(".json"):
        path = Path(argument)
        told = read_thresholds(path, name)
        told.model.require_same(loaded.identity, argument)
        if told.gates_file is not None:
            raise UsageError(f"the gate of {argument} has stand-ins already: those of {told.gates_file.file}")
        gate = gate_from_thresholds(told, path.parent, loaded.decoder)
    else:
        gate = build_gate(spec, loaded.decoder, seed=seed)
        parameters = gate.parameters()
        if name == "entropy":
            options = parse_options(argument, EntropyGate.options, "gate 'entropy'")
            if options["lens"] != "head":
                raise UsageError("gate 'entropy': stand-ins are trained with the lens of the model itself: lens=head")
            parameters = {
                key: value
                for key, value in options.items()
                if value is not None and key not in [option.name for option in GUARD_OPTIONS]
            }
        told = Thresholds.model_validate(
            {
                "gate": name, "layers": [], "thresholds": [], "probes": {}, "parameters": parameters,
                "target_label": "none", "guards": asdict(gate.guards), "found_by": {"spec": spec},
                "promise": {"kind": "exit-rate", "target": {}}, "model": loaded.identity.model_dump(),
            }
        )  # fmt: skip
    return gate, told


def distill_given(
    loaded: LoadedModel, text: TextSpec, options: GivenOptions, out: Path, resume: bool = False,
    progress: Progress = quiet_progress, world: World | None = None,
) -> GivenReport:  # fmt: skip
    world = world or World()
    if world.main:
        make_folder(out.parent)
    gate, told = read_gate(options.gate, loaded, options.seed)
    if any(branch.adds_residual for branch in loaded.decoder.branches):
        raise InputError("an MLP that adds the residual itself has no stand-in that could be fitted to it")
    held, train = split(read_windows(text, loaded.tokenizer), options.seed)
    trainer = GivenTrainer(loaded, train, options, gate, open_state(out, resume, world), progress, world)
    begun = {layer: exported(module) for layer, module in trainer.standins.items()}
    trainer.run()
    ways = _measured(trainer, held, begun) if world.main else {}
    if world.main:
        recipe = trainer.recipe(text, skip_rates=trainer.skip_rates, ways=ways)
        probes = {x: exported(p) for x, p in gate.probes.items()} if isinstance(gate, ProbeGate) else {}
        standins = {layer: exported(module, loaded.model.dtype) for layer, module in trainer.standins.items()}
        with folder_lock(out.parent):
            GatesFile(
                gate.name, loaded.identity, gate.guards.sinks, probes, standins, [ways[TRAINED]], recipe,
                told.model_dump(),
            ).write(out)  # fmt: skip
        out.with_suffix(".training.pt").unlink(missing_ok=True)
    layers = sorted(trainer.standins)
    config = loaded.model.config.get_text_config()
    cost = [
        trainer.standins[x].flops() / branch_flops(loaded.decoder.branches[x].entry, config)  # type: ignore[operator]
        for x in layers
    ]
    return GivenReport(
        out,
        options.gate,
        layers,
        trainer.step,
        trainer.tokens(text),
        trainer.elapsed,
        sum(cost) / len(cost),
        len(held),
        ways,
    )


def _measured(trainer: GivenTrainer, held: Tensor, begun: dict[int, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Under the same choices of the same gate: nothing, the linear start, and what training made of it."""
    trained = {layer: exported(module) for layer, module in trainer.standins.items()}
    found: dict[str, dict[str, float]] = {}
    for name, states in ((ZERO, None), (LINEAR, begun), (TRAINED, trained)):
        for layer, state in (states or {}).items():
            trainer.standins[layer].load_state_dict(state)
        standin: StandIn = ZeroStandIn() if states is None else as_standins(dict(trainer.standins))
        found |= measure_given(trainer.loaded, held, trainer.gate, {name: standin})
    return found
