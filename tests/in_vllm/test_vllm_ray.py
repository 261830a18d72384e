"""Ray as vLLM's executor, two workers: in a cluster that was started apart, and in one that vLLM starts itself.

vLLM refuses Ray on the CPU; `ray_on_cpu` names a resource for it, the rest is vLLM's executor and Ray as they are."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray_on_cpu
from conftest import ROOT
from test_vllm_engines import expected, model, offline  # noqa: F401

pytestmark = pytest.mark.timeout(900)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
STORE = 100_000_000
EXECUTORS = {"new": "1", "old": "0"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """For whoever starts Ray. Its folder holds sockets, whose paths must be short."""
    plugin = ray_on_cpu.install(tmp_path_factory.mktemp("platform") / "plugin")
    folder = tempfile.mkdtemp(prefix="ray")
    paths = [str(ROOT), str(plugin), os.environ.get("PYTHONPATH")]
    yield {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_OVERRIDE_RESOURCES": '{"GPU": 2}',
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(environment):
    """A Ray that runs before vLLM and after it, and knows nothing of our variables. Yields the environment that leads to it."""
    from sedac_cli.vllm.serving import kill_session

    folder = tempfile.mkdtemp(prefix="ray")
    environment = environment | {"RAY_TMPDIR": folder}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SEDAC_", "PROMETHEUS_", "VLLM_"))}
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port),
         "--object-store-memory", str(STORE), "--include-dashboard", "false"],
        env=own | environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not listens(port):
            assert head.poll() is None, "ray did not start"
            assert time.monotonic() < deadline
            time.sleep(1)
        time.sleep(5)  # its raylet follows
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        assert head.poll() is None  # what vLLM did not start it does not stop
    finally:
        kill_session(head.pid)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@needs_ray
@pytest.mark.vllm
@pytest.mark.parametrize("executor", EXECUTORS)
def test_settings_and_artifacts_reach_workers_of_a_cluster(model, cluster, tmp_path, executor):  # noqa: F811
    from sedac_cli.vllm.handshake import read_reports, require_workers

    spec = f"cascade:{model[2]}/thresholds.json"
    reports = tmp_path / "reports"
    more = {
        "SEDAC_HANDSHAKE_DIR": str(reports), "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": "SEDAC_HANDSHAKE_DIR",
        "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": EXECUTORS[executor],
    }  # fmt: skip
    found = offline(
        model[1], {"gate": spec}, cluster | more, tensor_parallel_size=2, distributed_executor_backend="ray"
    )
    want, run = expected(model, spec)
    assert found["rounds"][0] == want
    assert [(status["rank"], status["skipped"]) for status in found["status"]] == [
        (rank, run.skipped_per_layer) for rank in (0, 1)
    ]
    workers = require_workers(read_reports(reports), 2)
    assert {worker["pid"] for worker in workers} == {status["pid"] for status in found["status"]}


@needs_ray
@pytest.mark.vllm
@pytest.mark.parametrize("where", ["started by vLLM", "in a cluster", "in a cluster, old executor"])
def test_a_server_comes_up_counts_and_leaves_nothing(model, environment, request, tmp_path, where):  # noqa: F811
    import test_serving
    from openai import OpenAI

    reached = environment if where == "started by vLLM" else request.getfixturevalue("cluster")
    reached = reached | {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": EXECUTORS["old" if "old" in where else "new"]}
    arguments = [*test_serving.ARGUMENTS, "--tensor-parallel-size", "2", "--distributed-executor-backend", "ray"]
    server = test_serving.Server(
        tmp_path / "log", reached, model=str(model[1]), gate="always:2", arguments=arguments, served_name="tiny"
    )
    try:
        server.facts = server.ready()
        workers = server.facts["workers"]
        assert {worker["rank"] for worker in workers} == {0, 1}
        server.client = OpenAI(base_url=server.facts["url"] + "/v1", api_key="none", max_retries=0, timeout=120)
        want, run = expected(model, "always:2", [[11, 90, 200, 33, 8]])
        assert test_serving.complete(server, [[11, 90, 200, 33, 8]]) == want
        test_serving.wait_until_idle(server)
        told = test_serving.metrics(server)
        assert told["sedac_calls_total"] == 5 + 7
        assert told["sedac_mlps_skipped_total"] == sum(run.skipped_per_layer) == 2 * (5 + 7)
        assert server.stop() == 0, server.log.read_text()[-4000:]
    finally:
        if server.process.poll() is None:
            server.stop()
    deadline = time.monotonic() + 10  # workers in a cluster end after their driver, of which Ray tells them
    while any(alive(worker["pid"]) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    if where == "started by vLLM":
        assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and environment["RAY_TMPDIR"] in command(pid)]


def alive(pid: int) -> bool:
    """A process that nobody has waited for yet is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_what_leads_a_group_of_its_own_goes_with_the_server(tmp_path):
    """As workers of Ray's do: a signal to the server's group does not reach them."""
    from sedac_cli.vllm.serving import running

    told = tmp_path / "pid"
    child = f"import os, pathlib, time; os.setpgrp(); pathlib.Path({str(told)!r}).write_text(str(os.getpid())); time.sleep(100)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with running([sys.executable, "-c", parent], dict(os.environ), grace=5):
        deadline = time.monotonic() + 60
        while not (told.is_file() and told.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert alive(int(told.read_text()))
    deadline = time.monotonic() + 10
    while alive(int(told.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.1)
