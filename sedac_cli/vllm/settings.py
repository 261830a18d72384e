"""What a run under vLLM was asked to do: the SEDAC_ variables and `--additional-config '{"sedac": {...}}'`, parsed here alone.

What is given in additional_config goes before the environment. The settings, with the plugin's version and a digest of the
artifacts, are put back into additional_config: every worker reads them there, on whatever machine it runs, and they enter the
key of vLLM's compile cache, so that what was compiled without a gate is never taken for what needs one.

    settings = read_settings({"gate": "always:14"}, os.environ)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sedac_cli import __version__
from sedac_cli.errors import InputError, UsageError, did_you_mean

KEY = "sedac"
ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


class Settings(BaseModel):
    """Field X is the variable SEDAC_X. Without `gate`: probes of `probe_dir` as a cascade at `probe_layers`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = False
    gate: str | None = None
    probe_layers: list[int] = [7, 14, 21]
    probe_dir: str = "./sedac_data"
    probe_rank: int = Field(64, ge=1)
    adaptive: bool = True
    thresholds: list[float] | None = None
    exit_rates: list[float] = [0.2, 0.6, 0.9]
    calibration_steps: int = Field(50, ge=1)
    log_every: int = Field(50, ge=0)
    sinks: int | None = Field(None, ge=0)
    protect_first: int | None = Field(None, ge=0)
    protect_last: int | None = Field(None, ge=0)
    phase: Literal["both", "decode", "prefill"] | None = None
    seed: int = 0
    mlp: Literal["auto", "nodes", "kernels"] = "auto"
    """How a gated MLP is run inside a CUDA graph. `auto`: by kernels on Hopper, where its weights lie open."""
    given: list[str] = []
    """Names that were set rather than left at their default."""
    version: str = __version__
    artifacts: str = ""
    """sha256 over the files the gate is made from."""

    @field_validator("exit_rates")
    @classmethod
    def _rates(cls, values: list[float]) -> list[float]:
        if any(not 0 <= value <= 1 for value in values):
            raise ValueError("rates lie between 0 and 1")
        return values

    @field_validator("probe_layers")
    @classmethod
    def _rising(cls, values: list[int]) -> list[int]:
        if not values or values != sorted(set(values)) or values[0] < 0:
            raise ValueError("layers rise and count from 0, such as 7,14,21")
        return values

    @model_validator(mode="after")
    def _one_each(self) -> Settings:
        if self.gate is None and self.enabled:
            for name, values in (("thresholds", self.thresholds), ("exit_rates", self.exit_rates)):
                used = self.adaptive == (name == "exit_rates")
                if used and values is not None and len(values) != len(self.probe_layers):
                    raise ValueError(f"{len(values)} {name} for {len(self.probe_layers)} probe_layers")
        return self

    @property
    def digest(self) -> str:
        """Short name of exactly these settings, artifacts and version: the same in every process of a run."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:12]


OWN = frozenset({"given", "version", "artifacts"})
"""Not for users to set."""
NAMES = [name for name in Settings.model_fields if name not in OWN]


def read_settings(
    asked: Mapping[str, Any] | None, environment: Mapping[str, str], switched: Mapping[str, Any] | None = None
) -> Settings | None:
    """The settings of a run, or None if no gate is asked for. `asked` is what additional_config holds under "sedac",
    `switched` what `sedac patch` left in this Python environment."""
    values: dict[str, Any] = {} if switched is None else {"enabled": True, **switched}
    for name in NAMES:
        variable = "SEDAC_" + name.upper()
        if variable in environment:
            values[name] = _from_text(name, environment[variable], variable)
    if asked is not None:
        if not isinstance(asked, Mapping):
            raise UsageError(f"additional_config: sedac is {type(asked).__name__}, expected options by name")
        for name in asked:
            if name not in NAMES:
                raise UsageError(
                    f"additional_config: sedac has no option '{name}'.{did_you_mean(str(name), NAMES)}",
                    hint="options: " + ", ".join(NAMES),
                )
        values |= {"enabled": True, **asked}
    if not values.get("enabled"):
        return None
    values["probe_dir"] = str(Path(values.get("probe_dir", "./sedac_data")).expanduser().absolute())
    values["given"] = sorted(set(values) - {"enabled", "probe_dir"})
    return _checked(values)


def settings_of(additional_config: Any) -> Settings | None:
    """What `read_settings` made, read back in another process."""
    stored = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if stored is None:
        return None
    if not isinstance(stored, Mapping) or "version" not in stored:
        raise InputError(
            "this engine was configured by a process in which the sedac plugin was not loaded",
            hint="install sedac in every environment that takes part, and let VLLM_PLUGINS name it if it is set",
        )
    if stored["version"] != __version__:
        raise InputError(f"this worker has sedac {__version__}, the engine was configured by sedac {stored['version']}")
    settings = _checked(dict(stored))
    return settings if settings.enabled else None


def _checked(values: dict[str, Any]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        where = f"sedac settings: {name} (SEDAC_{name.split('.')[0].upper()})" if name else "sedac settings"
        raise UsageError(
            f"{where}: {first['msg']}, found {first['input']!r}" if name else f"{where}: {first['msg']}"
        ) from None


def _from_text(name: str, text: str, variable: str) -> Any:
    """An environment variable in the field's own form."""
    kind = str(Settings.model_fields[name].annotation)
    text = text.strip()
    if kind == str(bool):
        if text.lower() not in ON + OFF:
            raise UsageError(f"{variable} is '{text}': expected 1 or 0")
        return text.lower() in ON
    if "list" in kind:
        return [part.strip() for part in text.split(",")] if text else None
    return text if text or kind == str(str) else None
