"""A matrix: which configurations of which model to measure on which work, and what they must keep. One JSON file.

The form is that of the earlier versions' test matrices (`base_model`, `experiments`, `thresholds`); what they did not say
(batches, prompt lengths, repeats) has defaults. A key or mode that is not known is refused, naming the closest one.

    matrix = read_matrix("builtin:speed")
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sedac_cli.artifacts.files import read_json
from sedac_cli.bench.modes import Mode, find_mode
from sedac_cli.config import SHAPE
from sedac_cli.errors import UsageError, did_you_mean
from sedac_cli.resources import data_dir

BUILTIN = "builtin:"
BackendName = Literal["hf", "vllm", "openai"]
EngineName = Literal["auto", "eager", "graph"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpeculativeConfig(Strict):
    """Names as vLLM writes them. `method` may repeat what the mode says; `num_speculative_tokens` is the draft length, or
    its upper end where it adapts."""

    method: str | None = None
    num_speculative_tokens: int = Field(default=4, ge=1, le=64)
    prompt_lookup_max: int = Field(default=4, ge=1)
    prompt_lookup_min: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> SpeculativeConfig:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(f"prompt_lookup_min {self.prompt_lookup_min} > prompt_lookup_max {self.prompt_lookup_max}")
        return self


class Thresholds(Strict):
    """What a configuration must keep; each applies where it means something (min_ar to drafts, max_ppl_ratio to gates)."""

    min_ar: float | None = Field(default=None, ge=0, le=1)
    min_trr: float | None = Field(default=None, ge=0, le=1)
    max_ppl_ratio: float | None = Field(default=None, ge=0)
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    min_speedup: float | None = Field(default=None, ge=0)


class Experiment(Strict):
    """One configuration. A gate is named by `gate`, or by the `sedac_*` keys of the earlier versions."""

    name: str = Field(min_length=1)
    mode: str = "gated"
    gate: str | None = None
    engine: EngineName | None = None
    speculative_config: SpeculativeConfig | None = None
    base_url: str | None = None
    extra_body: dict[str, Any] = {}
    thresholds: Thresholds | None = None
    sedac_enabled: bool = True
    sedac_layer: int | None = Field(default=None, ge=0)
    sedac_threshold: float | None = None
    sedac_probe_layers: list[int] | None = None
    sedac_thresholds: list[float] | None = None
    sedac_exit_rates: list[float] | None = None
    sedac_calibration_steps: int | None = Field(default=None, ge=1)
    sedac_adaptive: bool | None = None
    sedac_probe_dir: str | None = None
    sedac_probe_path: str | None = None
    sedac_probe_rank: int | None = Field(default=None, ge=1)
    sedac_log_every: int | None = Field(default=None, ge=0)
    """Earlier versions printed their decisions every so often; what was skipped is in the results, so nothing is printed."""

    @field_validator("sedac_probe_layers", "sedac_thresholds", "sedac_exit_rates", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Also as the environment variables of the same name have it: "7,14,21"."""
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("speculative_config", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == {} else value

    @property
    def how(self) -> Mode:
        mode = find_mode(self.mode)
        return mode if self.sedac_enabled or not mode.gated else find_mode("dense")

    @property
    def drafts(self) -> SpeculativeConfig:
        return self.speculative_config or SpeculativeConfig()

    @property
    def is_baseline(self) -> bool:
        return self.how.name == "dense"

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        mode = self.how
        probes = {
            k: v
            for k, v in self.model_dump().items()
            if k.startswith("sedac_") and k not in ("sedac_enabled", "sedac_log_every") and v is not None
        }
        if self.gate and probes:
            raise ValueError(f"gate and {next(iter(probes))} each name a gate: give one")
        method = self.speculative_config.method if self.speculative_config else None
        if self.speculative_config and not mode.loop:
            raise ValueError(f"mode '{mode.name}' makes no drafts: speculative_config has no effect there")
        if method is not None and method not in (kinds := _methods(mode)):
            raise ValueError(
                f"method '{method}' is not what mode '{mode.name}' does ({', '.join(kinds) or 'no drafts'})"
            )
        return self


DENSE = Experiment(name="dense", mode="dense")
"""What is measured where a matrix names no dense experiment."""


def _methods(mode: Mode) -> list[str]:
    return [{"gate": "sedac"}.get(part, part) for part in (mode.draft or "").split("_") if part]


class Quality(Strict):
    """Text on which a gate's quality is measured in the same run; 0 samples measures none. `tasks`: lm-eval tasks."""

    samples: int = Field(default=16, ge=0)
    max_length: int = Field(default=256, ge=2)
    batch_size: int = Field(default=4, ge=1)
    tasks: list[str] = []
    task_folder: str | None = None
    """Task files of one's own."""
    task_limit: int | None = Field(default=None, ge=1)


class Matrix(Strict):
    name: str = ""
    description: str = ""
    base_model: str = "builtin:tiny"
    backend: BackendName = "hf"
    engine: EngineName = "auto"
    base_url: str | None = None
    batch: list[int] = Field(default=[1], min_length=1)
    prompt_lengths: list[int] = Field(default=[64], min_length=1)
    new_tokens: int = Field(default=32, ge=1)
    repeats: int = Field(default=5, ge=1)
    warmup: int = Field(default=1, ge=0)
    dataset: str = "builtin:books"
    split: str | None = "validation"
    prompts: str | None = None
    """A file of prompts, or `synthetic` for random tokens; else the text of `dataset`."""
    concurrency: list[int] = []
    request_rates: list[float] = []
    requests: int = Field(default=32, ge=1)
    request_timeout: float = Field(default=120.0, gt=0)
    chat: bool = False
    gpu_memory_utilization: float = Field(default=0.4, gt=0, le=1)
    quality: Quality = Quality()
    experiments: list[Experiment] = Field(min_length=1)
    thresholds: Thresholds = Thresholds()

    @model_validator(mode="after")
    def _fits(self) -> Matrix:
        for what in ("batch", "prompt_lengths", "concurrency", "request_rates"):
            if any(value <= 0 for value in getattr(self, what)):
                raise ValueError(f"{what} holds {min(getattr(self, what))}: expected values above 0")
        names = [experiment.name for experiment in self.experiments]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two experiments are called '{twice[0]}'")
        return self

    @property
    def random_weights(self) -> bool:
        """Known before anything is measured."""
        return self.base_model.startswith(SHAPE)

    def limits(self, experiment: Experiment) -> Thresholds:
        """The experiment's own thresholds over those of the matrix."""
        own = experiment.thresholds.model_dump(exclude_none=True) if experiment.thresholds else {}
        return Thresholds(**(self.thresholds.model_dump() | own))


def ready_matrices() -> dict[str, Path]:
    return {path.stem: path for path in sorted((data_dir() / "matrices").glob("*.json"))}


def read_matrix(where: str) -> Matrix:
    """`builtin:speed`, or a file."""
    path = Path(where).expanduser()
    if where.startswith(BUILTIN):
        ready = ready_matrices()
        name = where.removeprefix(BUILTIN)
        if name not in ready:
            raise UsageError(
                f"there is no ready matrix '{name}'.{did_you_mean(name, list(ready))}",
                hint=", ".join(BUILTIN + known for known in ready),
            )
        path = ready[name]
    document = read_json(path)
    if not isinstance(document, dict):
        raise UsageError(f"{path}: expected an object with 'experiments', found {type(document).__name__}")
    return make_matrix({"name": path.stem} | document, str(path))


def make_matrix(document: dict[str, Any], where: str | None = None) -> Matrix:
    """`where`: the file it is from; None: the command line, whose options have its keys' names."""
    try:
        return Matrix.model_validate(document)
    except ValidationError as error:
        unknown = [found for found in error.errors() if found["type"] == "extra_forbidden"]
        found = _explain((unknown or error.errors())[0])
        as_option = re.sub(r"^\w+(?=: )", lambda key: "--" + key[0].replace("_", "-"), found)
        raise UsageError(f"{where}: {found}" if where else as_option) from None


_KEYS: dict[str, type[BaseModel]] = {
    "experiments": Experiment,
    "speculative_config": SpeculativeConfig,
    "thresholds": Thresholds,
    "quality": Quality,
}


def _explain(error: Any) -> str:
    """The first finding, with the place in the file and, for an unknown key, the closest known one."""
    place = [part for part in error["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    at = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if error["type"] == "extra_forbidden":
        model: type[BaseModel] = Matrix
        for part in place[:-1]:
            model = _KEYS.get(str(part), model)
        return f"unknown key '{at}'.{did_you_mean(str(place[-1]), list(model.model_fields))}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error":
        message += "." + did_you_mean(str(error["input"]), re.findall(r"'([^']+)'", error["ctx"]["expected"]))
    return f"{at}: {message}" if at else message
