"""vLLM's OpenAI server on the CPU with a gate, through `serve_vllm` and the real `openai` client. One server for the module."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, save_tiny

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

DRIVER = """
import json, sys
from pathlib import Path
from sedac_cli.__main__ import report_error
from sedac_cli.errors import SedacError
from sedac_cli.vllm.serving import ServeOptions, serve_vllm
options = json.loads(sys.argv[1])
options["arguments"] = tuple(options["arguments"])
ready = lambda served: print(json.dumps({"url": served.url, "vllm": served.vllm, "workers": served.workers}), flush=True)
try:
    code = serve_vllm(ServeOptions(**options), ready, say=lambda text: print(text, file=sys.stderr))
except SedacError as error:
    code = report_error(error)
sys.exit(code)
"""
ARGUMENTS = [
    "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "64",
    "--gpu-memory-utilization", "0.2", "--enforce-eager", "--seed", "0", "--block-size", "32",
]  # fmt: skip
LAYERS = 4


class Server:
    """`serve_vllm` in a process of its own, as a shell would start it."""

    def __init__(self, log: Path, environment=None, **options):
        self.log = log
        values = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        }  # fmt: skip
        options = {"arguments": ARGUMENTS, "port": 0, "grace": 60} | options
        self.out = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(options)], env=values | (environment or {}), cwd=log.parent,
            stdout=subprocess.PIPE, stderr=self.out, text=True,
        )  # fmt: skip

    def ready(self):
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()[-4000:]
        return json.loads(answer)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from vllm_helpers import PROMPTS, SIZE, save_probes

    from sedac_cli.models import load_model

    folder = save_tiny(tmp_path_factory.mktemp("served") / "tiny", "qwen2", **SIZE)
    loaded = load_model(str(folder))
    probes = folder.parent / "probes"
    probes.mkdir()
    thresholds = save_probes(probes, loaded, PROMPTS, layers=(1, 2), share=0.4)
    return loaded, folder, probes, thresholds


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    from openai import OpenAI

    _, folder, probes, _ = model
    log = tmp_path_factory.mktemp("log") / "server.log"
    running = Server(
        log, model=str(folder), gate=f"cascade:{probes}/thresholds.json", settings={"log_every": 5}, control=True,
        served_name="tiny", api_key="secret",
    )  # fmt: skip
    facts = running.ready()
    running.facts = facts
    running.client = OpenAI(base_url=facts["url"] + "/v1", api_key="secret", max_retries=0, timeout=120)
    yield running
    code = running.stop() if running.process.poll() is None else running.process.returncode
    assert code == 0, log.read_text()[-4000:]
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(folder) in command_of(pid)]


def command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def complete(server, prompts, tokens=8, **wish):
    """New tokens of each prompt, greedily."""
    done = server.client.completions.create(
        model="tiny", prompt=prompts, max_tokens=tokens, temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, **({"vllm_xargs": wish} if wish else {})},
    )  # fmt: skip
    return [choice.token_ids for choice in done.choices]


def metrics(server) -> dict[str, float]:
    """Every sample of ours."""
    with urllib.request.urlopen(server.facts["url"] + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("sedac_"))}


def rpc(server, method, *args):
    body = json.dumps({"method": method, "args": list(args)}).encode()
    request = urllib.request.Request(
        server.facts["url"] + "/collective_rpc", body,
        {"Content-Type": "application/json", "Authorization": "Bearer secret"},
    )  # fmt: skip
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read() or b"null")


def expected(model, gated: bool, prompts=None):
    from vllm_helpers import hugging_face

    from sedac_cli.gates.simple import NeverGate
    from sedac_cli.runtime.plan import Plan, make_plan
    from sedac_cli.standins import ZeroStandIn

    loaded, _, probes, _ = model
    plan = (
        make_plan(f"cascade:{probes}/thresholds.json", loaded.decoder, loaded.identity)
        if gated
        else Plan(NeverGate(LAYERS), ZeroStandIn())
    )
    return hugging_face(loaded, plan, prompts)[0]


def test_ready_names_every_worker(server):
    workers = server.facts["workers"]
    assert len(workers) == 1
    assert workers[0]["gate"] == "cascade"
    assert workers[0]["gated"] == [1, 2, 3]


def test_gated_and_opted_out_requests_are_what_hugging_face_computes(model, server):
    """In this order: what skipping left in the prefix cache must not serve the request that opted out."""
    from vllm_helpers import PROMPTS

    gated, dense = expected(model, True), expected(model, False)
    assert gated != dense
    assert complete(server, PROMPTS) == gated
    assert complete(server, PROMPTS, sedac=0) == dense
    assert complete(server, PROMPTS) == gated


def test_a_stricter_threshold_of_a_request(model, server):
    from vllm_helpers import PROMPTS

    before = rpc(server, "sedac_status")["results"][0]
    assert complete(server, PROMPTS, sedac_threshold=1e-6) == expected(model, False)
    after = rpc(server, "sedac_status")["results"][0]
    assert after["skipped"] == before["skipped"]
    assert after["tokens"] > before["tokens"]
    assert complete(server, PROMPTS, sedac_threshold=1e6) == expected(model, True)  # never a looser one


@pytest.mark.parametrize(
    "wish", [{"sedac": 7}, {"sedac": "perhaps"}, {"sedac_treshold": 1}, {"sedac_threshold": "low"}]
)
def test_nonsense_is_answered_and_the_server_goes_on(model, server, wish):
    from openai import BadRequestError
    from vllm_helpers import PROMPTS

    with pytest.raises(BadRequestError, match=next(iter(wish))):
        complete(server, PROMPTS, **wish)
    with pytest.raises(BadRequestError, match=next(iter(wish))):  # before the stream begins, not in it
        server.client.completions.create(model="tiny", prompt="a", stream=True, extra_body={"vllm_xargs": wish})
    assert complete(server, [PROMPTS[0]]) == expected(model, True, [PROMPTS[0]])


def test_thresholds_change_while_serving(model, server):
    from vllm_helpers import PROMPTS

    thresholds = model[3]
    rpc(server, "sedac_set_thresholds", [0.0, 0.0])
    fresh = [[9, 8, *prompt] for prompt in PROMPTS]  # not in the prefix cache
    try:
        assert complete(server, fresh) == expected(model, False, fresh)
        time.sleep(2.5)
        assert metrics(server)['sedac_threshold{layer="1",rank="0"}'] == 0
    finally:
        rpc(server, "sedac_set_thresholds", thresholds)
    again = [[8, 9, *prompt] for prompt in PROMPTS]
    assert complete(server, again) == expected(model, True, again)
    with pytest.raises(urllib.error.HTTPError):
        rpc(server, "sedac_set_thresholds", [1.0, 2.0, 3.0])
    assert complete(server, [PROMPTS[0]]) == expected(model, True, [PROMPTS[0]])


def test_metrics_are_the_counters(server):
    complete(server, [[3, 5, 7, 11, 13]])
    time.sleep(2.5)
    shown, status = metrics(server), rpc(server, "sedac_status")["results"][0]
    assert shown["sedac_calls_total"] == status["tokens"] > 0
    assert shown["sedac_mlps_total"] == LAYERS * status["tokens"]
    assert shown["sedac_mlps_skipped_total"] == sum(status["skipped"])
    assert shown['sedac_skipped_mlp_ratio{rank="0"}'] == pytest.approx(status["skip_ratio"])
    for layer in (1, 2, 3):
        assert shown[f'sedac_exits_total{{layer="{layer}"}}'] == status["exits"][layer]
    assert shown['sedac_decision_latency_seconds{rank="0"}'] > 0
    assert 'sedac_threshold{layer="2",rank="0"}' in shown
    assert "of MLPs skipped" in server.log.read_text()


def test_many_mixed_requests_with_cancellations(model, server):
    """Prompts of all lengths, four kinds of wishes (one is nonsense), a third hung up on: all are answered, none stays behind in
    the engine, the counters agree with each other and with what the clients sent and saw. SEDAC_SOAK=1000 sends more."""
    from openai import BadRequestError

    rng = random.Random(0)
    wishes = [{}, {"sedac": 0}, {"sedac_threshold": 0.01}, {"sedac": "perhaps"}]
    faults: list[BaseException] = []
    seen = {"answered": 0, "refused": 0, "hung up": 0, "possible": 0, "received": 0}
    total = int(os.environ.get("SEDAC_SOAK", "240"))
    work = list(range(total))
    lock = threading.Lock()
    before = rpc(server, "sedac_status")["results"][0]

    def client():
        while True:
            with lock:
                if not work:
                    return
                work.pop()
                prompt = [rng.randrange(2, 260) for _ in range(rng.choice([1, 3, 20, 70, 150]))]
                wish, hang_up = rng.choice(wishes), rng.random() < 1 / 3
            received, ended = 0, "answered"
            try:
                stream = server.client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=24, temperature=0, stream=True,
                    extra_body={"ignore_eos": True, "return_token_ids": True, **({"vllm_xargs": wish} if wish else {})},
                )  # fmt: skip
                for number, part in enumerate(stream):
                    received += len(part.choices[0].token_ids or []) if part.choices else 0
                    if hang_up and number == 3:
                        stream.close()
                        ended = "hung up"
                        break
                if ended == "answered" and received != 24:
                    raise AssertionError(f"{received} of 24 tokens came")
            except BadRequestError as error:
                ended = "refused"
                if wish.get("sedac") != "perhaps":
                    faults.append(error)
            except BaseException as error:
                faults.append(error)
            with lock:
                seen[ended] += 1
                if ended != "refused":
                    seen["possible"] += len(prompt) + 24
                    seen["received"] += received

    threads = [threading.Thread(target=client, daemon=True) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60 + total)
    assert not any(thread.is_alive() for thread in threads)
    assert not faults
    assert seen["answered"] + seen["refused"] + seen["hung up"] == total
    assert min(seen.values()) > 0
    wait_until_idle(server)
    status = rpc(server, "sedac_status")["results"][0]
    spent = status["tokens"] - before["tokens"]
    assert seen["received"] - total <= spent <= seen["possible"]  # the last token of an answer is never computed on
    exits, skipped = status["exits"], status["skipped"]
    assert 0 < sum(exits) < status["tokens"]
    latched = [sum(exits[: layer + 1]) for layer in range(LAYERS)]
    assert latched == skipped  # who has exited skips from there on
    shown = metrics(server)
    assert shown["sedac_calls_total"] == status["tokens"]
    assert shown["sedac_mlps_skipped_total"] == sum(skipped)
    fresh = [[7, 7, 9, 200, 31]]
    assert complete(server, fresh) == expected(model, True, fresh)


def wait_until_idle(server, seconds: float = 30) -> None:
    """No request runs or waits, and the metrics have caught up."""
    deadline = time.monotonic() + seconds
    while True:
        with urllib.request.urlopen(server.facts["url"] + "/metrics") as answer:
            lines = answer.read().decode().splitlines()
        left = {line for line in lines if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))}
        assert left
        if all(float(line.rsplit(" ", 1)[1]) == 0 for line in left):
            break
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    time.sleep(2.5)


def test_a_taken_port_and_nonsense_are_refused_at_once(model):
    from sedac_cli.errors import InputError, UsageError
    from sedac_cli.vllm.serving import ServeOptions, serve_vllm

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot listen"):
        serve_vllm(ServeOptions(str(model[1]), port=taken.getsockname()[1]))
    for more, words in (
        ({"gate": "learned:nowhere.pth@0.2"}, "no file"),
        ({"gate": "newest"}, "no gate 'newest'"),
        ({"settings": {"colour": 1}}, "colour"),
        ({"arguments": ("--additional-config", '{"sedac": {}}')}, "holds 'sedac'"),
        ({"arguments": ("--additional-config", "[")}, "not a JSON object"),
        ({"arguments": ("--port=8",)}, "--port"),
    ):
        with pytest.raises((InputError, UsageError), match=words):
            serve_vllm(ServeOptions(str(model[1]), port=0, **more))
