"""`sedac ls`: what there is to choose from."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from sedac_cli.commands.ls import ls

app = typer.Typer()
app.command()(ls)


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_gates_with_every_option():
    gates = {gate["name"]: gate for gate in json.loads(run("gates", "--json"))["gates"]}
    assert {"never", "fixed", "cascade", "soft", "stability", "entropy"} <= set(gates)
    tau = next(option for option in gates["stability"]["options"] if option["name"] == "tau")
    assert (tau["default"], tau["range"]) == ("0.95", "-1 .. 1")
    table = run("gates")
    for gate in gates.values():
        assert gate["form"] in table
        assert all(option["name"] in table for option in gate["options"])


@pytest.mark.parametrize(("what", "name"), [("models", "builtin:tiny"), ("datasets", "builtin:books")])
def test_what_is_built_in(what, name):
    assert name in run(what)
    found = json.loads(run(what, "--json"))[what]
    assert found[0]["name"] == name
    assert found[0]["bytes"] > 10_000


def test_an_unknown_list_is_refused():
    assert CliRunner().invoke(app, ["gats"]).exit_code == 2


def test_importing_the_command_imports_no_torch():
    code = "import sys, sedac_cli.commands.ls; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
