"""Values as the user writes them: lists of layers and rates, and the YAML file behind `--config`.

Precedence is command line > environment (`SEDAC_<COMMAND>_<OPTION>`) > YAML > default. A YAML file holds options of the
running command, or one section per command so that a single file serves the whole pipeline:

    collect:      {model: builtin:tiny, layers: [7, 14, 21]}
    train-probes: {epochs: 10}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedac_cli.errors import InputError, UsageError, did_you_mean


def parse_layers(text: str) -> list[int]:
    """`"7,14,21"` -> [7, 14, 21]; strictly rising, because rates and thresholds are given in the same order."""
    layers = [_number(part, int, "layers", "whole numbers such as 7,14,21") for part in _parts(text, "layers")]
    if len(set(layers)) != len(layers):
        raise UsageError(f"--layers names a layer twice: {text}")
    if layers != sorted(layers):
        raise UsageError(
            f"--layers must rise: {text}", hint=f"--layers {','.join(map(str, sorted(layers)))}, other lists alike"
        )
    if layers[0] < 0:
        raise UsageError(f"--layers counts from 0: {text}")
    return layers


def parse_span(text: str, option: str = "skip-layers") -> tuple[int, ...]:
    """`"18..21"` -> (18, 19, 20, 21); one number is a span of one."""
    first, dots, last = (part.strip() for part in text.partition(".."))
    form = "the first and the last layer, such as 18..21"
    begin = _number(first, int, option, form)
    end = _number(last, int, option, form) if dots else begin
    if not 0 <= begin <= end:
        raise UsageError(f"--{option}: {text} is no span of layers", hint=f"--{option} takes {form}")
    return tuple(range(begin, end + 1))


def parse_rates(text: str, option: str) -> list[float]:
    """`"0.2,0.6,0.9"` -> floats in [0, 1]."""
    rates = [_number(part, float, option, "numbers such as 0.2,0.6,0.9") for part in _parts(text, option)]
    for rate in rates:
        if not 0.0 <= rate <= 1.0:
            raise UsageError(f"--{option}: {rate} is not between 0 and 1")
    return rates


def parse_list(text: str | None, kind: type, option: str) -> list[Any] | None:
    """`"1,8"` -> [1, 8], all above 0; None stays None: not given."""
    if text is None:
        return None
    numbers = [_number(part, kind, option, "numbers such as 1,8") for part in _parts(text, option)]
    for number in numbers:
        if not number > 0:
            raise UsageError(f"--{option}: {number} is not above 0")
    return numbers


def split_gates(text: str) -> list[str]:
    """Gate specs divided by commas; what follows a comma as `name=value` still belongs to the spec before it."""
    found: list[str] = []
    for part in _parts(text, "gates"):
        if found and "=" in part.partition(":")[0]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _parts(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in str(text).split(",")]
    if "" in parts:
        raise UsageError(
            f"--{option}: '{text}' has an empty entry", hint=f"--{option} takes entries with commas between them"
        )
    return parts


def _number(text: str, kind: type, option: str, form: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"--{option}: '{text}' is not a number", hint=f"--{option} takes {form}") from None


def read_yaml_options(path: Path, command: str, options: dict[str, bool], commands: set[str]) -> dict[str, Any]:
    """The options a YAML file gives to one command, by parameter name; unknown keys are refused.

    `options` says of each name whether it may be given more than once. Values are read as the command line would read
    them. An option in the command's section wins over the same option outside.
    """
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected options as 'name: value' lines, found {type(document).__name__}")

    sections = {key: value for key, value in document.items() if key in commands and isinstance(value, dict | None)}
    own = {key: value for key, value in document.items() if key not in sections} | (sections.get(command) or {})
    known = sorted(option.replace("_", "-") for option in options)
    values = {}
    for key, value in own.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise UsageError(
                f"{path}: '{key}' is not an option of `sedac {command}`."
                + did_you_mean(str(key), [*known, *sorted(commands)]),
                hint="options: " + ", ".join(known),
            )
        if value is not None:
            values[name] = _as_typed(value, options[name], f"{path}: {key}")
    return values


def _as_typed(value: Any, repeated: bool, where: str) -> str | list[str]:
    """A YAML value as the words of a command line: a list is repeated or joined by commas, as the option has it."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(x, dict | list) for x in value)):
        raise UsageError(f"{where}: expected a value or a list of values, found {type(value).__name__}")
    words = [str(x).lower() if isinstance(x, bool) else str(x) for x in (value if isinstance(value, list) else [value])]
    return words if repeated else ",".join(words)


SHAPE = "shape:"
"""Begins the name of a model with random weights in the shape of a known one: speed can be measured with it, nothing else."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it. `ref` is `builtin:tiny`, a local folder or a hub id."""

    ref: str = "builtin:tiny"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    load_in_4bit: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TextSpec:
    """Which text, and how it becomes samples of at most `max_length` tokens."""

    dataset: str = "builtin:books"
    split: str | None = None
    text_column: str | None = None
    samples: int = 500
    max_length: int = 512
    pack: bool = True
    shuffle: bool = True
    seed: int = 0
