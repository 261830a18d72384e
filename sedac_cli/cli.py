"""The Typer app: names and order of the commands, nothing else."""

from __future__ import annotations

import typer

from sedac_cli.commands.bench import app as bench
from sedac_cli.commands.calibrate import calibrate
from sedac_cli.commands.chat import chat
from sedac_cli.commands.collect import collect
from sedac_cli.commands.demo import demo
from sedac_cli.commands.distill import distill
from sedac_cli.commands.doctor import doctor
from sedac_cli.commands.eval import eval_
from sedac_cli.commands.generate import generate
from sedac_cli.commands.ls import ls
from sedac_cli.commands.patch import patch
from sedac_cli.commands.report import report
from sedac_cli.commands.run import run
from sedac_cli.commands.serve import serve
from sedac_cli.commands.train_probes import train_probes
from sedac_cli.commands.validate import validate

ABOUT = "Skip the MLP work a language model's tokens do not need, and measure what it costs and saves."
ENVIRONMENT = "Every option can also be set by SEDAC_<COMMAND>_<OPTION>, or in a YAML file given with --config."

app = typer.Typer(
    name="sedac",
    no_args_is_help=True,
    context_settings={"auto_envvar_prefix": "SEDAC", "help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

for command in (
    collect,
    train_probes,
    distill,
    calibrate,
    validate,
    generate,
    chat,
    serve,
    eval_,
    patch,
    report,
    run,
    demo,
    doctor,
    ls,
):
    app.command(command.__name__.strip("_").replace("_", "-"), epilog=ENVIRONMENT)(command)
app.add_typer(bench, name="bench", epilog=ENVIRONMENT)


def _version(show: bool) -> None:
    if show:
        from sedac_cli import __version__

        typer.echo(f"sedac {__version__}")
        raise typer.Exit


@app.callback(help=ABOUT, epilog=ENVIRONMENT)
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, allow_from_autoenv=False, help="Print the version."
    ),
) -> None:
    pass
