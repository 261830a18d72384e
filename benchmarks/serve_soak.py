"""Many requests against `sedac serve`: does memory grow, does a request get stuck, do the counters say what clients saw?

Starts the server as a process of its own and keeps `--clients` connections busy with a mix of what clients do: every
route, whole and streamed, several choices, batches, slow readers, nonsense. In the first half every client hears its
answer out, so every counter must be *equal* to the sum of what clients saw. In the second half some also hang up in
mid-stream: what is made for them nobody sees, so there counters of work may be larger, by no more than was asked for.
Exit code 1 when anything is off.

    python benchmarks/serve_soak.py --requests 10000 --out benchmarks/results/serve_soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

PATIENT = {"whole": 25, "stream": 20, "chat": 10, "chat stream": 10, "choices": 8, "generate": 7, "batch": 8,
           "slow reader": 2, "nonsense": 10}  # fmt: skip
"""What clients do, and how often, while all of them hear their answers out."""
IMPATIENT = PATIENT | {"hang up": 15, "hang up in queue": 5}
PATHS = {"chat": "/v1/chat/completions", "chat stream": "/v1/chat/completions", "generate": "/generate",
         "batch": "/batch_generate", "hang up in queue": "/v1/chat/completions"}  # fmt: skip
ENDPOINTS = {"/v1/completions": "completions", "/v1/chat/completions": "chat", "/generate": "generate",
             "/batch_generate": "batch_generate"}  # fmt: skip
PROMPTS = ["The sea was", "In the morning", "He had never", "A king of the old", "It was a dark night and " * 8]
STUCK, LONG, MAX_BODY = 120, 400, 0.05
"""Seconds without an answer; new tokens asked for by who will hang up; the server's --max-body in MB."""
KEY = "soak"
JSON = {"Content-Type": "application/json"}
NONSENSE: list[tuple[int, dict[str, Any], str]] = [
    (400, {"json": {"prompt": "x", "max_tokens": -1}}, "invalid"),
    (400, {"json": {"prompt": "x", "max_tokens": 10**30}}, "invalid"),
    (400, {"json": {"prompt": "", "temperature": "hot"}}, "invalid"),
    (400, {"json": {"prompt": "x", "logit_bias": {"5": 100}}}, "invalid"),
    (400, {"json": {"prompt": [0, 10**9]}}, "invalid"),
    (400, {"json": {"prompt": "sea " * 12_000}}, "invalid"),
    (404, {"json": {"prompt": "x", "model": "another"}}, "invalid"),
    (400, {"content": b'{"prompt": "the sea', "headers": JSON}, "invalid"),
    (400, {"content": b'{"prompt": "\xff\xfe"}', "headers": JSON}, "invalid"),
    (415, {"content": b"prompt=x"}, "invalid"),
    (413, {"json": {"prompt": "word " * 20_000}}, "invalid"),
    (401, {"json": {"prompt": "x"}, "headers": {"Authorization": "Bearer wrong"}}, "unauthorized"),
]
"""Status that is due, what is sent, and the outcome it is counted as."""


class Soak:
    """One stretch of requests of one mix, and what its clients saw."""

    def __init__(self, url: str, mix: dict[str, int], arguments: argparse.Namespace):
        self.url, self.mix, self.clients, self.tokens = url, mix, arguments.clients, arguments.tokens
        self.rng = random.Random(f"{arguments.seed} {len(mix)}")
        self.seen: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.unseen = 0
        self.done, self.longest = 0, 0.0

    async def run(self, requests: int, sample: Callable[[int], None]) -> None:
        work = iter(self.rng.choices(list(self.mix), list(self.mix.values()), k=requests))
        limits = httpx2.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(timeout=STUCK, limits=limits, headers=headers) as client:
            watch = asyncio.create_task(self._watch(sample))
            await asyncio.gather(*(self._client(client, work) for _ in range(self.clients)))
            watch.cancel()

    async def _watch(self, sample: Callable[[int], None]) -> None:
        while True:
            sample(self.done)
            await asyncio.sleep(1)

    async def _client(self, client: httpx2.AsyncClient, work: Any) -> None:
        for kind in work:
            while True:
                began = time.monotonic()
                try:
                    outcome = await self._ask(client, kind)
                except httpx2.HTTPError as error:
                    outcome = type(error).__name__
                self.longest = max(self.longest, time.monotonic() - began)
                self.outcomes[f"{kind}: {outcome}"] += 1
                if outcome != "429":
                    break
                self.ended[f"{ENDPOINTS[PATHS.get(kind, '/v1/completions')]},rejected"] += 1
                await asyncio.sleep(0.5 + self.rng.random())
            self.done += 1

    async def _ask(self, client: httpx2.AsyncClient, kind: str) -> str:
        path = PATHS.get(kind, "/v1/completions")
        if kind == "nonsense":
            due, sent, counted = self.rng.choice(NONSENSE)
            path = self.rng.choice(list(ENDPOINTS)) if due in (401, 413, 415) else path
            status = (await client.post(self.url + path, **sent)).status_code
            self.ended[f"{ENDPOINTS[path]},{counted}"] += 1
            return "refused" if status == due else f"{status} where {due} is due"
        body = self._body(kind, path)
        if not body.get("stream"):
            answer = await client.post(self.url + path, json=body)
            return self._heard(path, answer.status_code, answer.json())
        async with client.stream("POST", self.url + path, json=body) as answer:
            if answer.status_code != 200:
                return str(answer.status_code)
            last: dict[str, Any] = {}
            async for line in answer.aiter_lines():
                if kind.startswith("hang up") and line:
                    self.ended[f"{ENDPOINTS[path]},gone"] += 1
                    self.unseen += LONG
                    return "hung up"
                if kind == "slow reader":
                    await asyncio.sleep(self.rng.random())
                if line.startswith("data: {"):
                    last = json.loads(line.removeprefix("data: "))
            return self._heard(path, 200, last)

    def _body(self, kind: str, path: str) -> dict[str, Any]:
        rng = self.rng
        body: dict[str, Any] = {"temperature": rng.choice([0.0, 1.0]), "seed": rng.randrange(2**31), "ignore_eos": True}
        new = LONG if kind.startswith("hang up") else rng.randint(1, self.tokens)
        body["max_tokens" if path.startswith("/v1") else "max_new_tokens"] = new
        dense = rng.random() < 0.1
        body |= {"sedac": {"dense": dense}} if path.startswith("/v1") else {"dense": dense}
        if "chat" in path:
            body["messages"] = [{"role": "user", "content": rng.choice(PROMPTS)}]
        elif kind == "batch":
            body["prompts"] = rng.sample(PROMPTS, 3)
        else:
            body["prompt"] = rng.choice(PROMPTS)
        if kind == "choices":
            body["n"] = 3
        if kind in ("stream", "chat stream", "slow reader") or kind.startswith("hang up"):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def _heard(self, path: str, status: int, document: dict[str, Any]) -> str:
        if status != 200:
            return str(status)
        if "sedac" not in document and "skip_ratio" not in document:
            return "broken stream"
        sedac = document.get("sedac", document)
        self.ended[f"{ENDPOINTS[path]},ok"] += 1
        results = document.get("results", [document])
        self.seen["new tokens"] += (
            document["usage"]["completion_tokens"] if "usage" in document else sum(r["new_tokens"] for r in results)
        )
        for phase, number in sedac["calls"].items():
            self.seen[f"calls {phase}"] += number
        for layer, number in sedac["exits"].items():
            self.seen[f"exits {layer}"] += number
        return "200"


def counters(url: str) -> dict[str, float]:
    found = {}
    text = httpx2.get(url + "/metrics", timeout=60, headers={"Authorization": f"Bearer {KEY}"}).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(sample.labels.values())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def settled(url: str) -> dict[str, float]:
    """The counters when nothing runs any more, or after half a minute."""
    end = time.monotonic() + 30
    while True:
        found = counters(url)
        if time.monotonic() > end or not any(found[f"sedac_{n}"] for n in ("open_requests", "running", "waiting")):
            return found
        time.sleep(0.1)


def start(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "sedac_cli", "serve", "--backend", arguments.backend, "--model", arguments.model, "--gate",
               arguments.gate, "--port", "0", "--json", "--quiet", "--max-queue", str(arguments.max_queue),
               "--max-body", str(MAX_BODY)]  # fmt: skip
    environment = os.environ | {"SEDAC_SERVE_API_KEY": KEY}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    document = ""
    while not document.rstrip().endswith("}"):
        line = process.stdout.readline()
        if not line:
            sys.exit("the server did not start")
        document += line
    return process, json.loads(document)["url"]


def slope(samples: list[tuple[int, float, int]]) -> float:
    """MB per 1,000 requests, over the second half: the first fills caches."""
    late = samples[len(samples) // 2 :]
    if len(late) < 3:
        return float("nan")
    done, mb, _ = np.array(late).T
    return float(np.polyfit(done, mb, 1)[0] * 1000)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--gate", default="always:20")
    parser.add_argument("--backend", default="eager", help="eager, or graph on a GPU")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=8, help="most new tokens of a request")
    parser.add_argument("--max-queue", type=int, default=40)
    parser.add_argument("--max-slope", type=float, default=2.0, help="MB per 1,000 requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    process, url = start(arguments)
    server = psutil.Process(process.pid)
    memory: list[tuple[int, float, int]] = []
    stretches: list[dict[str, Any]] = []
    began = time.monotonic()
    try:
        before = settled(url)
        for mix in (PATIENT, IMPATIENT):
            soak, earlier = Soak(url, mix, arguments), sum(s["requests"] for s in stretches)

            def sample(done: int, earlier: int = earlier) -> None:
                memory.append((earlier + done, server.memory_info().rss / 1e6, server.num_fds()))

            asyncio.run(soak.run(arguments.requests // 2, sample))
            after = settled(url)
            stretches.append(
                {
                    "requests": soak.done, "outcomes": dict(sorted(soak.outcomes.items())), "seen": dict(soak.seen),
                    "ended": dict(sorted(soak.ended.items())), "unseen_tokens_at_most": soak.unseen,
                    "longest_request_s": soak.longest, "left": {k: after[k] for k in after if k in GAUGES},
                    "counted": {k: v - before.get(k, 0) for k, v in after.items() if k not in GAUGES},
                }
            )  # fmt: skip
            before = after
        seconds = time.monotonic() - began
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
    result = {
        "arguments": {k: str(v) for k, v in vars(arguments).items() if k != "out"}, "seconds": seconds, "exit_code": code,
        "stretches": stretches, "slope_mb_per_1000": slope(memory), "requests_memory_mb_open_files": memory,
    }  # fmt: skip
    faults = judge(result, arguments.max_slope)
    result["faults"] = faults
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=None) + "\n")
    shown = {k: v for k, v in result.items() if k not in ("requests_memory_mb_open_files", "stretches")}
    print(json.dumps(shown | {"outcomes": [s["outcomes"] for s in stretches]}, indent=1))
    return 1 if faults else 0


GAUGES = ("sedac_open_requests", "sedac_running", "sedac_waiting")


def judge(result: dict[str, Any], max_slope: float) -> list[str]:
    """What is off."""
    faults = [f"stretch {n}: {fault}" for n, one in enumerate(result["stretches"], 1) for fault in judge_one(one)]
    if result["exit_code"] != 0:
        faults.append(f"the server left with {result['exit_code']}")
    if not result["slope_mb_per_1000"] <= max_slope:
        faults.append(f"memory grows by {result['slope_mb_per_1000']:.2f} MB per 1,000 requests")
    files = [count for _, _, count in result["requests_memory_mb_open_files"]]
    if max(files[len(files) // 2 :], default=0) > max(files[: len(files) // 2], default=0) + 50:
        faults.append(f"open files grow from {files[0]} to {files[-1]}")
    return faults


def judge_one(one: dict[str, Any]) -> list[str]:
    counted, seen, ended, spare = one["counted"], one["seen"], one["ended"], one["unseen_tokens_at_most"]
    faults = []
    for endpoint in ENDPOINTS.values():
        mine = {o: ended.get(f"{endpoint},{o}", 0) for o in ("ok", "gone", "rejected", "invalid", "unauthorized")}
        outcomes = (*mine, "cancelled", "timeout", "error")
        theirs = {o: int(counted.get(f"sedac_requests_total{{{endpoint},{o}}}", 0)) for o in outcomes}
        # Who hangs up on a request that ends in that moment is counted as answered.
        theirs["gone"] = theirs.pop("cancelled") + theirs["ok"] - mine["ok"]
        theirs["ok"] = mine["ok"]
        if theirs != mine | {"timeout": 0, "error": 0}:
            faults.append(f"{endpoint}: clients saw {mine}, the server counted {theirs}")
    pairs = {"new tokens": "sedac_generated_tokens_total", "calls prefill": "sedac_calls_total{prefill}",
             "calls decode": "sedac_calls_total{decode}"}  # fmt: skip
    pairs |= {f"exits {n}": f"sedac_exits_total{{{n}}}" for n in range(1000) if f"sedac_exits_total{{{n}}}" in counted}
    for mine, theirs in pairs.items():
        extra = counted[theirs] - seen.get(mine, 0)
        most = 0 if not spare else float("inf") if mine == "calls prefill" or mine.startswith("exits") else spare
        if not 0 <= extra <= most:
            faults.append(f"{mine}: clients saw {seen.get(mine, 0)}, the server counted {counted[theirs]:.0f}")
    faults += [f"{name} is {value:.0f} when all is over" for name, value in one["left"].items() if value]
    expected = ("200", "429", "refused", "hung up")
    bad = {name: n for name, n in one["outcomes"].items() if name.split(": ")[1] not in expected}
    if bad:
        faults.append(f"unexpected answers: {bad}")
    return faults


if __name__ == "__main__":
    sys.exit(main())
