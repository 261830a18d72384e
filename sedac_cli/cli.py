"""The Typer app: names and order of the commands, nothing else."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="sedac",
    help="Skip the MLP work a language model's tokens do not need, and measure what it costs and saves.",
    no_args_is_help=True,
    context_settings={"auto_envvar_prefix": "SEDAC", "help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=True,
)
