"""Many requests against `sedac serve`: does memory grow, does a request get stuck, do the counters say what clients saw?

Starts the server as a process of its own, keeps `--clients` connections busy with a mix of what clients do (whole,
streamed, several choices, hanging up in mid-stream, nonsense), and compares at the end. Exit code 1 when anything is off.

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
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

MIX = {"whole": 40, "stream": 30, "choices": 10, "hang up": 10, "nonsense": 10}
PROMPTS = ["The sea was", "In the morning", "He had never", "A king of the old"]


class Soak:
    def __init__(self, url: str, requests: int, clients: int, tokens: int, seed: int):
        self.url, self.requests, self.clients, self.tokens = url, requests, clients, tokens
        self.rng = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.longest = 0.0

    async def run(self, sample: Any) -> None:
        work: asyncio.Queue[str] = asyncio.Queue()
        for kind in self.rng.choices(list(MIX), list(MIX.values()), k=self.requests):
            work.put_nowait(kind)
        async with httpx2.AsyncClient(timeout=300, limits=httpx2.Limits(max_connections=None)) as client:
            watch = asyncio.create_task(self._watch(work, sample))
            await asyncio.gather(*(self._client(client, work) for _ in range(self.clients)))
            watch.cancel()

    async def _watch(self, work: asyncio.Queue[str], sample: Any) -> None:
        while True:
            sample(self.requests - work.qsize())
            await asyncio.sleep(1)

    async def _client(self, client: httpx2.AsyncClient, work: asyncio.Queue[str]) -> None:
        while not work.empty():
            kind = work.get_nowait()
            began = time.monotonic()
            while True:
                outcome = await self._ask(client, kind)
                self.outcomes[f"{kind}: {outcome}"] += 1
                if outcome != "429":
                    break
                await asyncio.sleep(0.05)
            self.longest = max(self.longest, time.monotonic() - began)

    async def _ask(self, client: httpx2.AsyncClient, kind: str) -> str:
        body: dict[str, Any] = {
            "prompt": self.rng.choice(PROMPTS), "max_tokens": self.rng.randint(1, self.tokens), "temperature": 1.0,
            "seed": self.rng.randrange(2**31), "ignore_eos": True,
        }  # fmt: skip
        if kind == "nonsense":
            body["max_tokens"] = -1
        if kind == "choices":
            body["n"] = 3
        url = self.url + "/v1/completions"
        if kind in ("whole", "choices", "nonsense"):
            answer = await client.post(url, json=body)
            if answer.status_code == 200:
                self._count(answer.json())
            return str(answer.status_code)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if kind == "hang up":
            body["max_tokens"] = 400
        async with client.stream("POST", url, json=body) as answer:
            if answer.status_code != 200:
                return str(answer.status_code)
            last: dict[str, Any] = {}
            async for line in answer.aiter_lines():
                if kind == "hang up" and line:
                    return "hung up"
                if line.startswith("data: {"):
                    last = json.loads(line.removeprefix("data: "))
            if "usage" not in last:
                return "broken stream"
            self._count(last)
            return "200"

    def _count(self, document: dict[str, Any]) -> None:
        self.seen["requests"] += 1
        self.seen["new tokens"] += document["usage"]["completion_tokens"]
        for phase, number in document["sedac"]["calls"].items():
            self.seen[f"calls {phase}"] += number
        for layer, number in document["sedac"]["exits"].items():
            self.seen[f"exits {layer}"] += number


def counters(url: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(httpx2.get(url + "/metrics", timeout=60).text):
        for sample in family.samples:
            labels = ",".join(sample.labels.values())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def start(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "sedac_cli", "serve", "--model", arguments.model, "--gate", arguments.gate,
               "--port", "0", "--json", "--quiet", "--max-queue", str(arguments.max_queue)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    document = ""
    while not document.rstrip().endswith("}"):
        line = process.stdout.readline()
        if not line:
            sys.exit("the server did not start")
        document += line
    return process, json.loads(document)["url"]


def slope(samples: list[tuple[int, float]]) -> float:
    """MB per 1,000 requests, over the second half: the first fills caches."""
    late = samples[len(samples) // 2 :]
    if len(late) < 3:
        return float("nan")
    done, mb = np.array(late).T
    return float(np.polyfit(done, mb, 1)[0] * 1000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--gate", default="always:20")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=8, help="most new tokens of a request")
    parser.add_argument("--max-queue", type=int, default=32)
    parser.add_argument("--max-slope", type=float, default=2.0, help="MB per 1,000 requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    process, url = start(arguments)
    memory: list[tuple[int, float]] = []
    server = psutil.Process(process.pid)
    soak = Soak(url, arguments.requests, arguments.clients, arguments.tokens, arguments.seed)
    began = time.monotonic()
    try:
        asyncio.run(soak.run(lambda done: memory.append((done, server.memory_info().rss / 1e6))))
        seconds = time.monotonic() - began
        end = time.monotonic() + 30
        while (found := counters(url))["sedac_open_requests"] + found["sedac_running"] + found["sedac_waiting"]:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
    result = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()}, "seconds": seconds, "exit_code": code,
        "outcomes": dict(sorted(soak.outcomes.items())), "seen": dict(soak.seen), "longest_request_s": soak.longest,
        "memory_mb": memory, "slope_mb_per_1000": slope(memory), "counters": found,
    }  # fmt: skip
    faults = judge(result, arguments.max_slope)
    result["faults"] = faults
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in ("memory_mb", "counters")}, indent=1))
    return 1 if faults else 0


def judge(result: dict[str, Any], max_slope: float) -> list[str]:
    """What is off. Requests that hung up made tokens nobody saw: there counters may be larger, never smaller."""
    found, seen, outcomes = result["counters"], result["seen"], result["outcomes"]
    faults = []
    hung = sum(number for name, number in outcomes.items() if name.startswith("hang up: hung"))
    finished = int(found.get("sedac_requests_total{completions,ok}", 0))
    cancelled = int(found.get("sedac_requests_total{completions,cancelled}", 0))
    if finished + cancelled != seen.get("requests", 0) + hung:
        faults.append(
            f"clients saw {seen.get('requests', 0)} answers and hung up on {hung}; counted {finished} + {cancelled}"
        )
    rejected = sum(number for name, number in outcomes.items() if name.endswith(": 429"))
    if rejected != int(found.get("sedac_requests_total{completions,rejected}", 0)):
        faults.append(f"clients saw {rejected} rejections, the server counted another number")
    pairs = {"new tokens": "sedac_generated_tokens_total", "calls prefill": "sedac_calls_total{prefill}",
             "calls decode": "sedac_calls_total{decode}"}  # fmt: skip
    pairs |= {f"exits {n}": f"sedac_exits_total{{{n}}}" for n in range(1000) if f"sedac_exits_total{{{n}}}" in found}
    for mine, theirs in pairs.items():
        exact = seen.get(mine, 0) == found[theirs]
        if not (exact or (hung and found[theirs] >= seen.get(mine, 0))):
            faults.append(f"{mine}: clients saw {seen.get(mine, 0)}, the server counted {found[theirs]:.0f}")
    for name in ("sedac_open_requests", "sedac_running", "sedac_waiting"):
        if found[name]:
            faults.append(f"{name} is {found[name]:.0f} when all is over")
    bad = {name: n for name, n in outcomes.items() if name.split(": ")[1] not in ("200", "429", "400", "hung up")}
    if bad:
        faults.append(f"unexpected answers: {bad}")
    if result["exit_code"] != 0:
        faults.append(f"the server left with {result['exit_code']}")
    if result["slope_mb_per_1000"] > max_slope:
        faults.append(f"memory grows by {result['slope_mb_per_1000']:.2f} MB per 1,000 requests")
    return faults


if __name__ == "__main__":
    sys.exit(main())
