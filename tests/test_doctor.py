"""The doctor looks at a sick machine and stays well."""

from __future__ import annotations

import builtins
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from machines import machine  # noqa: F401 - a fixture

from sedac_cli import doctor
from sedac_cli.doctor import examine


def named(checks):
    return {check.name: check for check in checks}


def test_this_machine():
    checks = named(examine())
    assert list(checks) == ["python", "torch", "cuda", "cupy", "graphs", "transformers", "bitsandbytes", "vllm", "built-in model",
                            "memory", "disk", "hub"]  # fmt: skip
    assert checks["python"].status == checks["torch"].status == checks["built-in model"].status == "ok"
    assert checks["hub"].detail.startswith("HF_HUB_OFFLINE")


def test_what_libraries_log_on_import_is_not_shown():
    done = subprocess.run([sys.executable, "-m", "sedac_cli", "doctor"], capture_output=True, text=True, check=True)
    assert "bitsandbytes" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "error", [ImportError("libcudart\nsecond line"), OSError("broken"), SystemExit(3), RuntimeError()]
)
def test_nothing_imports_and_it_still_answers(monkeypatch, error):
    real = builtins.__import__

    def broken(name, *args, **more):
        if name.split(".")[0] in ("torch", "bitsandbytes", "sedac_cli"):
            raise error
        return real(name, *args, **more)

    def fails(*args, **more):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", broken)
        patch.setattr(doctor, "_installed", fails)
        patch.setattr(doctor.shutil, "disk_usage", fails)
        patch.setattr(doctor.os, "sysconf", fails)
        checks = named(examine())
    assert len(checks) == 12
    bad = {name for name, check in checks.items() if check.status == "problem"}
    assert bad == set(checks) - {"python", "hub"}
    assert checks["torch"].detail.startswith(f"{type(error).__name__}: ")
    assert "\n" not in checks["torch"].detail
    assert "[" not in checks["torch"].detail


def test_ctrl_c_is_not_swallowed(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_disk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        examine()


def test_a_hub_that_does_not_answer(monkeypatch):
    def unreachable(*args, **more):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket, "create_connection", unreachable)
    hub = named(examine())["hub"]
    assert (hub.status, hub.detail) == ("missing", "huggingface.co: Temporary failure in name resolution")


def test_missing_and_mismatched_packages(monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    assert {doctor._cupy().status, doctor._vllm().status, doctor._bitsandbytes().status} == {"missing"}
    monkeypatch.setattr(doctor, "_installed", lambda name: "13.6" if name == "cupy-cuda13x" else None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert doctor._cupy().status == "problem"
    assert doctor._cupy().fix == "pip uninstall -y cupy-cuda13x && pip install cupy-cuda12x"
    monkeypatch.setattr(doctor, "_installed", lambda name: "13.6" if name in ("cupy-cuda12x", "cupy-cuda13x") else None)
    assert doctor._cupy().status == "problem"
    assert doctor._cupy().fix == ("pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install cupy-cuda12x")
    monkeypatch.setattr(doctor, "_installed", lambda name: "13.6" if name == "cupy-cuda12x" else None)
    assert doctor._cupy().status == "ok"


@pytest.mark.parametrize(
    ("torch_there", "transformers_there", "status"),
    [("2.9.1+cpu", "4.57.6", "problem"), ("2.10.0", "5.9.0", "problem"), ("2.11.0+cu130", "5.17.0", "ok"), ("3.0", "6.0.0rc1", "ok")],
)  # fmt: skip
def test_versions_older_than_were_run(monkeypatch, torch_there, transformers_there, status):
    import torch

    monkeypatch.setattr(torch, "__version__", torch_there)
    monkeypatch.setattr(doctor, "version", lambda package: transformers_there)
    assert [doctor._torch().status, doctor._transformers().status] == [status] * 2
    if status == "problem":
        assert doctor._transformers().fix == f"pip install 'transformers>={doctor.LEAST['transformers']}'"


def test_the_oldest_versions_are_those_the_package_asks_for():
    asked = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {f"{package}>={least}" for package, least in doctor.LEAST.items()} <= set(asked)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "a driver of CUDA 13.0"), ({"capability": (7, 5)}, "compute capability 7.5: the kernels need 8.0"),
        ({"driver": 12020}, "this driver has 12.2"), ({"bindings": False}, "pip install 'cuda-bindings==13.*'"),
        ({"cupy": 12}, "pip uninstall -y cupy-cuda12x && pip install cupy-cuda13x"),
    ],
)  # fmt: skip
def test_what_the_graph_engine_lacks(machine, changes, said):  # noqa: F811
    machine(**changes)
    found = doctor._graphs()
    assert found.status == ("missing" if changes else "ok")
    assert said in found.detail


def test_the_command(sedac):
    result = sedac("doctor", "--json")
    assert result.code == 0
    assert [check["name"] for check in result.json["checks"]][:2] == ["python", "torch"]
    assert sys.version.split()[0] in sedac("doctor").out
