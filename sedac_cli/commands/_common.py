"""What every subcommand shares: `--config --json --quiet --seed --debug`, and the model and text options.

A command names the groups it needs and receives them as one object each; Typer sees the single options.

    @sedac_command(model=ModelSpec(), text=TextSpec(samples=200))
    def validate(out: Output, seed: int, model: ModelSpec, text: TextSpec, thresholds: ... ) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sedac_cli.config import ModelSpec, TextSpec, read_yaml_options
from sedac_cli.console import Output, set_debug
from sedac_cli.hub import go_offline_if_unreachable, is_hub_ref


def option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def load_yaml(ctx: typer.Context, path: Path | None) -> Path | None:
    """Put the YAML file's values where they rank below the command line and the environment."""
    given: dict[str, Any] = {}
    if path is not None:
        parent = ctx.parent.command if ctx.parent else None
        commands = set(getattr(parent, "commands", {}))
        options = {
            str(p.name): bool(getattr(p, "multiple", False))
            for p in ctx.command.params
            if p.name not in ("config", "help")
        }
        given = read_yaml_options(path, str(ctx.info_name), options, commands)
    # Click would cut the variable of a repeated option at its spaces: one variable is one value.
    for parameter in ctx.command.params:
        variable = f"{ctx.auto_envvar_prefix}_{str(parameter.name).upper()}"
        if getattr(parameter, "multiple", False) and os.environ.get(variable):
            given[str(parameter.name)] = [os.environ[variable]]
    ctx.default_map = {**(ctx.default_map or {}), **given}
    return path


COMMON: dict[str, tuple[Any, Any]] = {
    "seed": (Annotated[int, option("Common", "--seed", min=0, max=2**32 - 1, help="Seed of everything random.")], 0),
    "config": (
        Annotated[
            Path | None,
            option("Common", "--config", is_eager=True, callback=load_yaml,
                   help="YAML file with options; the command line and the environment win."),
        ],
        None,
    ),
    "json": (Annotated[bool, option("Common", "--json", help="One JSON document on stdout, nothing else.")], False),
    "quiet": (Annotated[bool, option("Common", "--quiet", "-q", help="No progress, no notes.")], False),
    "debug": (Annotated[bool, option("Common", "--debug", help="Show the traceback of an error.")], False),
}  # fmt: skip

# Parameter name on the command line -> (field of the spec, annotation).
MODEL: dict[str, tuple[str, Any]] = {
    "model": ("ref", Annotated[str, option("Model", "--model", "-m", help="builtin:tiny, a local folder, or a hub id.")]),
    "revision": ("revision", Annotated[str | None, option("Model", "--revision", help="Hub branch, tag or commit.")]),
    "dtype": ("dtype", Annotated[str, option(
        "Model", "--dtype",
        help="auto, float32, bfloat16 or float16. auto: float32 on CPU, the checkpoint's own on a GPU.")]),
    "device": ("device", Annotated[str, option("Model", "--device", help="auto, cpu, cuda, cuda:1; auto takes a GPU if any.")]),
    "device_map": ("device_map", Annotated[str | None, option(
        "Model", "--device-map", help="Spread one model over several devices: auto, balanced, sequential.")]),
    "load_in_4bit": ("load_in_4bit", Annotated[bool, option(
        "Model", "--load-in-4bit", help="Quantize the weights to 4 bits (bitsandbytes).")]),
    "trust_remote_code": ("trust_remote_code", Annotated[bool, option(
        "Model", "--trust-remote-code", help="Run Python code that comes with the model.")]),
}  # fmt: skip

TEXT: dict[str, tuple[str, Any]] = {
    "dataset": ("dataset", Annotated[str, option(
        "Text", "--dataset", help="builtin:books, a .txt/.jsonl/.parquet/.csv file or folder of them, or a hub name.")]),
    "split": ("split", Annotated[str | None, option("Text", "--split", help="Split of a hub or built-in data set.")]),
    "text_column": ("text_column", Annotated[str | None, option("Text", "--text-column", help="Column with the text.")]),
    "samples": ("samples", Annotated[int, option("Text", "--samples", "-n", min=1, help="Number of samples.")]),
    "max_length": ("max_length", Annotated[int, option("Text", "--max-length", min=2, help="Tokens per sample.")]),
    "pack": ("pack", Annotated[bool, option(
        "Text", "--pack/--no-pack", help="Join documents and cut full samples, or one document per sample.")]),
    "shuffle": ("shuffle", Annotated[bool, option(
        "Text", "--shuffle/--no-shuffle", help="Take documents in seeded random order.")]),
}  # fmt: skip


def sedac_command(*, model: ModelSpec | None = None, text: TextSpec | None = None) -> Callable[..., Any]:
    """Make a Typer command of a function: the groups' options and the common ones join its own."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = {
            name: (parameter.annotation, parameter.default)
            for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
            if name not in ("out", "seed", "model", "text")
        }
        wants_seed = "seed" in inspect.signature(function).parameters
        groups: dict[str, tuple[Any, dict[str, tuple[str, Any]]]] = {}
        if model is not None:
            groups["model"] = (model, MODEL)
        if text is not None:
            groups["text"] = (text, TEXT)
        options: dict[str, tuple[Any, Any]] = {}
        for default, group in groups.values():
            options.update({name: (kind, getattr(default, field)) for name, (field, kind) in group.items()})
        options.update(own)
        options.update(COMMON)

        @functools.wraps(function)
        def command(**values: Any) -> Any:
            out = Output(json=values.pop("json"), quiet=values.pop("quiet"))
            seed = values.pop("seed")
            values.pop("config")
            if values.pop("debug"):
                set_debug(True)
            for name, (default, group) in groups.items():
                given = {field: values.pop(option_name) for option_name, (field, _) in group.items()}
                if "seed" in {f.name for f in fields(default)}:
                    given["seed"] = seed
                values[name] = type(default)(**given)
            if wants_seed:
                values["seed"] = seed
            named = [getattr(values[name], "ref" if name == "model" else "dataset") for name in groups]
            if any(map(is_hub_ref, named)):
                go_offline_if_unreachable()
            return function(out=out, **values)

        for kind, _ in options.values():
            kind.__metadata__[0].show_envvar = False  # one rule for all of them, told once at the end of the help
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter(name, keyword, default=default, annotation=kind)
            for name, (kind, default) in options.items()
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {name: kind for name, (kind, _) in options.items()}
        return command

    return decorate
