"""Engines side by side on one GPU, each in a process of its own, measured in turn; and the document that results go into.

What always holds: whatever is asked of an engine has a time limit; engines that are late, or that ended, are killed with all
their children; the document is written after each measurement, so a run that is cut off has kept what it measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shapes import ROOT, SHAPES, spread

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
TOGETHER = {
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_USE_NCCL_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
}  # fmt: skip


class TooLateError(RuntimeError):
    """The time of a part, or of the whole run, is over."""


class FailedError(RuntimeError):
    """An engine ended, or said that it could not do what was asked."""


@dataclass
class Spec:
    """An engine: plain vLLM if `sedac` is None. Two specs of one name are the same engine."""

    name: str
    sedac: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    variant: str = ""
    vocab_size: int = 0

    @property
    def forced(self) -> bool:
        """Whether it takes orders which layers are off."""
        return self.sedac is not None and str(self.sedac.get("gate")).startswith("forced")


class Engine:
    def __init__(self, spec: Spec, work: Path, python: str, environment: dict[str, str]):
        self.spec, self.name = spec, spec.name
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in spec.name)
        self.log = work / f"{safe}.log"
        path = work / f"{safe}.json"
        path.write_text(
            json.dumps({
                "sedac": spec.sedac, "engine": spec.engine, "variant": spec.variant, "vocab_size": spec.vocab_size,
                "root": str(ROOT),
            })
        )  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, str(HERE / "child.py"), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self.buffer = b""
        self.about: dict[str, Any] = {}

    def answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TooLateError(f"engine {self.name}: no answer within {seconds:.0f} s\n{self.tail(15)}")
            got = os.read(self.process.stdout.fileno(), 1 << 20)
            if not got:
                raise FailedError(f"engine {self.name} ended:\n{self.tail(30)}")
            self.buffer += got
        line, _, self.buffer = self.buffer.partition(b"\n")
        found = json.loads(line)
        if "error" in found:
            raise FailedError(f"engine {self.name}: {found['error']}")
        return found

    def send(self, do: str, **what: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((json.dumps({"do": do, **what}) + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise FailedError(f"engine {self.name} ended:\n{self.tail(30)}") from None

    def tail(self, lines: int) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """With all its children: they are the session it leads."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)


class Lab:
    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work = args, work
        self.shape = SHAPES[args.shape]
        self.end = time.monotonic() + args.minutes * 60
        self.part_end = self.end
        self.alive: dict[str, Engine] = {}
        self.lost: set[str] = set()
        """Engines that did not come up in this part, and are not tried again in it."""
        self.document: dict[str, Any] = {"engines": {}, "parts": {}, "problems": []}
        self.rows: list[dict[str, Any]] = []

    # Time and results -------------------------------------------------------------------------------------------

    def left(self) -> float:
        return min(self.end, self.part_end) - time.monotonic()

    def check(self, needed: float = 0.0) -> None:
        if self.left() < needed:
            raise TooLateError(f"{self.left():.0f} s are left, {needed:.0f} are needed")

    def save(self) -> None:
        path = self.args.out
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.document, indent=1))
        new.replace(path)

    def begin(self, part: str) -> None:
        self.rows = []
        self.lost.clear()
        self.document["parts"][part] = {"rows": self.rows}
        self.part_end = time.monotonic() + self.args.part_minutes * 60

    def add(self, **row: Any) -> dict[str, Any]:
        """A sample of the part that runs."""
        self.rows.append(row)
        self.save()
        return row

    def problem(self, text: str) -> None:
        self.document["problems"].append(text)
        print(text, file=sys.stderr, flush=True)
        self.save()

    # Engines ----------------------------------------------------------------------------------------------------

    def spec(self, name: str, sedac: dict[str, Any] | None = None, **more: Any) -> Spec:
        """An engine of the shape that is measured; `more` goes to vLLM, but for environment and variant."""
        args = self.args
        environment, variant = dict(more.pop("environment", {})), more.pop("variant", "")
        vocabulary = more.pop("vocab_size", self.shape["vocab_size"])
        compilation = {"cudagraph_mode": args.cudagraph_mode, "cudagraph_capture_sizes": args.sizes}
        compilation |= more.pop("compilation", {})
        engine = {
            "model": str(self.work / "model"), "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
            "max_model_len": 2048, "gpu_memory_utilization": args.memory, "max_num_seqs": max(args.sizes),
            "max_num_batched_tokens": 8192, "enable_prefix_caching": False, "seed": 0, "compilation_config": compilation,
        } | more  # fmt: skip
        if args.kv_gib:
            engine.setdefault("kv_cache_memory_bytes", int(args.kv_gib * 2**30))
        return Spec(name, sedac, engine, environment, variant, vocabulary)

    def plain(self, name: str = "plain", **more: Any) -> Spec:
        return self.spec(name, None, **more)

    def fused(self, name: str = "silu", **more: Any) -> Spec:
        """Plain vLLM with its own activation kernel, as a gated MLP uses it: then the arithmetic is the same to the bit."""
        return self.spec(name, None, compilation={"custom_ops": ["+silu_and_mul", "+gelu_and_mul"]}, **more)

    def forced(self, way: str = "nodes", name: str = "", **more: Any) -> Spec:
        return self.spec(name or way, {"gate": "forced:none", "mlp": way}, **more)

    def environment(self, spec: Spec) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), str(self.work / "site"), os.environ.get("PYTHONPATH")]))
        found = {key: value for key, value in os.environ.items() if not key.startswith("SEDAC_")}
        found |= ENVIRONMENT | {"PYTHONPATH": path, "VLLM_CACHE_ROOT": str(self.work / "cache")}
        if spec.engine.get("tensor_parallel_size", 1) > 1:
            found |= TOGETHER
        else:
            found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if spec.sedac is None:
            found["VLLM_PLUGINS"] = "none"
        return found | spec.environment

    def engines(self, specs: Sequence[Spec]) -> list[Engine]:
        """These, up. Others make room; those that are missing start at the same time."""
        wanted = {spec.name for spec in specs}
        for name in list(self.alive):
            if name not in wanted and len(self.alive.keys() | wanted) > self.args.most:
                self.stop(name)
        missing = [spec for spec in specs if spec.name not in self.alive]
        for spec in missing:
            if spec.name in self.lost:
                raise FailedError(f"engine {spec.name} did not come up")
        for place in range(0, len(missing), self.args.together):
            self.start(missing[place : place + self.args.together])
        return [self.alive[spec.name] for spec in specs]

    def start(self, group: Sequence[Spec]) -> None:
        """At the same time. Those that come up stay, whatever becomes of the others."""
        self.check(40)
        began, failed = time.monotonic(), None
        for spec in group:
            self.alive[spec.name] = Engine(spec, self.work, sys.executable, self.environment(spec))
        for spec in group:
            engine = self.alive[spec.name]
            limit = min(self.left(), self.args.start_seconds - (time.monotonic() - began))
            try:
                engine.about = engine.answer(max(1.0, limit))
            except (TooLateError, FailedError) as error:
                self.stop(spec.name)
                if isinstance(error, TooLateError):
                    self.lost.add(spec.name)
                failed = failed or error
                continue
            self.document["engines"][spec.name] = engine.about | {"sedac": spec.sedac, "variant": spec.variant}
            print(f"  {spec.name}: up in {engine.about['up']:.0f} s", file=sys.stderr, flush=True)
        if failed is not None:
            raise failed

    def start_once(self, specs: Sequence[Spec]) -> None:
        """All of them, each tried once: one that does not come up is a problem of its own, and lost to this part."""
        self.args.most = max(self.args.most, len(specs))
        for place in range(0, len(specs), self.args.together):
            group = specs[place : place + self.args.together]
            try:
                self.start(group)
            except (FailedError, TooLateError) as error:
                self.check(40)  # no time for any engine is no problem of these
                self.problem(f"left out: {error}")
            self.lost |= {spec.name for spec in group} - self.alive.keys()

    def those_that_start(self, specs: Sequence[Spec]) -> list[Engine]:
        """An engine that does not come up, alone or in its time, is a problem of its own: the others are measured without it."""
        specs = [spec for spec in specs if spec.name not in self.lost]
        try:
            return self.engines(specs)
        except (FailedError, TooLateError):
            found = []
            for spec in specs:
                try:
                    found.append(self.engine(spec))
                except (FailedError, TooLateError) as error:
                    self.check(40)  # no time for any engine is no problem of this one
                    self.lost.add(spec.name)
                    self.problem(f"left out: {error}")
            return found

    def engine(self, spec: Spec) -> Engine:
        return self.engines([spec])[0]

    def ask(self, engine: Engine, do: str, within: float = 120.0, **what: Any) -> dict[str, Any]:
        self.check(1)
        try:
            engine.send(do, **what)
            return engine.answer(min(within, self.left()))
        except (TooLateError, FailedError):
            self.stop(engine.name)  # its answer may still come, and would be taken for another's
            raise

    def interleave(self, specs: Sequence[Spec], rounds: int, work: Callable[[Engine, int], None]) -> None:
        """`work(engine, number)` for each engine in turn, round after round; round -1 warms up. With --alone one engine
        after the other has all of its rounds, where two do not fit."""
        groups = [[spec] for spec in specs] if self.args.alone else [list(specs)]
        for group in groups:
            engines = self.those_that_start(group)
            for number in range(-1, rounds):
                for engine in engines:
                    work(engine, number)

    def stop(self, name: str) -> None:
        engine = self.alive.pop(name, None)
        if engine is not None:
            engine.kill()

    def stop_all(self) -> None:
        for name in list(self.alive):
            self.stop(name)

    def off(self, share: float) -> list[int]:
        return spread(self.shape["num_hidden_layers"], share)

    def keep_logs(self) -> None:
        """The ends of all logs beside the document: what an engine said is needed when it failed."""
        folder = self.args.out.with_suffix(".logs")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        for log in self.work.glob("*.log"):
            (folder / log.name).write_text(log.read_text(errors="replace")[-20000:])


def clocks() -> str:
    """Of the GPU, for the record: a slow sample may be a hot one."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
        return done.stdout.strip().replace("\n", " | ")
    return ""
