"""What a gated worker tells Prometheus and the log. A thread reads the session's counters once a second; no step waits for it.

vLLM's server shows the metrics of its workers on /metrics if PROMETHEUS_MULTIPROC_DIR was set before it started (`sedac serve`
sets it). Ranks of one tensor-parallel group decide alike, so only the first of them counts.

    Reporter(session, rank=0, counts=True).start()
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sedac_cli.vllm.session import Session

log = logging.getLogger("vllm.sedac")
SECONDS = 1.0
FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """Made once per process, whatever engines come and go in it. Counters only grow; a reset of the session is no step back."""

    _made: Metrics | None = None

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        share_values()

        def gauge(name: str, text: str, *labels: str) -> Any:
            return Gauge(name, text, ["rank", *labels], multiprocess_mode="mostrecent")

        self.calls = Counter("sedac_calls_total", "Tokens the gate decided about.")
        self.steps = Counter("sedac_steps_total", "Steps of the engine in which the gate decided.")
        self.exits = Counter("sedac_exits_total", "Tokens by the first layer whose MLP they skipped.", ["layer"])
        self.mlps = Counter("sedac_mlps_total", "(token, layer) MLPs a dense model would have run.")
        self.skipped = Counter("sedac_mlps_skipped_total", "(token, layer) MLPs that were not run.")
        self.ratio = gauge("sedac_skipped_mlp_ratio", "Share of all (token, layer) MLPs that were not run.")
        self.seconds = Counter("sedac_decision_seconds_total", "Time spent deciding; not measured on CUDA.")
        self.latency = gauge("sedac_decision_latency_seconds", "Mean time of a step's decisions; not measured on CUDA.")
        self.threshold = gauge("sedac_threshold", "Thresholds in force, by the layer they belong to.", "layer")

    @classmethod
    def get(cls) -> Metrics:
        if cls._made is None:
            cls._made = cls()
        return cls._made


def share_values() -> None:
    """Have values kept where PROMETHEUS_MULTIPROC_DIR says. prometheus_client looks at it when it is imported, which in a worker
    of Ray's is before vLLM sets it there; and a folder of another machine cannot be written."""
    from prometheus_client import values

    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    shared = Path(folder).is_dir()
    if not shared:
        log.warning("sedac: this worker's metrics are not shown: %s=%s is no folder here", FOLDER, folder)
    if shared != (values.ValueClass is not values.MutexValue):
        values.ValueClass = values.MultiProcessValue() if shared else values.MutexValue


class Reporter:
    """One session's metrics and log lines, for as long as the session lives. `counts`: this rank stands for its group;
    `first_stage`: tokens are counted once, however many pipeline stages they pass."""

    def __init__(self, session: Session, rank: int, counts: bool, first_stage: bool = True):
        self._session, self.rank = weakref.ref(session), str(rank)
        self.counts, self.first_stage = counts, first_stage
        self.every = session.settings.log_every
        self.logged = 0
        self.settled = True
        """Whether what was last read was all of the steps that had begun."""
        self.stop = threading.Event()
        self.before: dict[str, Any] = {"steps": 0, "tokens": 0, "seconds": 0.0, "skipped": [], "exits": []}
        self.stream = torch.cuda.Stream(session.device) if session.device.type == "cuda" else None
        self.metrics = Metrics.get()
        if counts:
            for layer in session.gated:
                self.metrics.exits.labels(layer)  # shown as 0 until the first exit
            self.publish(session, self.read(session))

    def start(self) -> Reporter:
        threading.Thread(target=self._run, name="sedac-metrics", daemon=True).start()
        return self

    def _run(self) -> None:
        while not self.stop.wait(SECONDS):
            session = self._session()
            if session is None:
                return
            try:
                self.tick(session)
            except Exception as error:  # what is told about serving must not end it
                log.warning("sedac: metrics stop here: %s: %s", type(error).__name__, error)
                return
            del session

    def tick(self, session: Session) -> None:
        steps = session.counters.steps
        if not steps and not self.before["steps"]:
            return  # vLLM may still be capturing its graphs: the device is left alone
        if steps == self.before["steps"] and self.settled:
            if self.counts:
                with self.own_stream(session):
                    self.publish_thresholds(thresholds_of(session.gate))
            return
        now = self.read(session)
        if self.every and self.rank == "0" and now["steps"] // self.every != self.logged // self.every:
            self.logged = now["steps"]
            log.info("%s", line(now, session))
        self.publish(session, now)

    @contextlib.contextmanager
    def own_stream(self, session: Session) -> Iterator[None]:
        """On CUDA a stream that vLLM's work does not wait for."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(session.device), torch.cuda.stream(self.stream):
            yield

    def read(self, session: Session) -> dict[str, Any]:
        """The counters as they stand."""
        counters = session.counters
        quiet = session.settled()
        steps, tokens = counters.steps, counters.tokens
        with self.own_stream(session):
            getattr(session, "add_up", lambda: None)()
            self.settled = quiet and session.settled() and steps == counters.steps
            return {
                "steps": steps, "tokens": tokens, "skipped": counters.skipped.tolist(), "exits": counters.exits.tolist(),
                "seconds": counters.seconds, "thresholds": thresholds_of(session.gate),
            }  # fmt: skip

    def publish(self, session: Session, now: dict[str, Any]) -> None:
        """Add what came since the last time; after a reset everything came since."""
        before: dict[str, Any] = self.before if now["steps"] >= self.before["steps"] else dict.fromkeys(self.before, 0)
        # On CUDA a step may be half counted when it is read, and what was skipped seem less than it was: that is no growth.
        self.before = {name: _furthest(now[name], before[name]) for name in self.before}
        if not self.counts:
            return
        metrics = self.metrics

        def grown(name: str) -> float:
            return max(0, now[name] - before[name])

        if self.first_stage:
            metrics.calls.inc(grown("tokens"))
            metrics.steps.inc(grown("steps"))
        metrics.mlps.inc(grown("tokens") * len(session.layers))
        metrics.seconds.inc(grown("seconds"))
        earlier = before["exits"] or [0] * len(now["exits"])
        for layer in session.gated:
            metrics.exits.labels(layer).inc(max(0, now["exits"][layer] - earlier[layer]))
        metrics.skipped.inc(sum(self.before["skipped"]) - sum(before["skipped"] or [0]))
        metrics.ratio.labels(self.rank).set(ratio(now, session))
        if now["seconds"] and grown("steps"):
            metrics.latency.labels(self.rank).set(grown("seconds") / grown("steps"))
        self.publish_thresholds(now["thresholds"])

    def publish_thresholds(self, values: dict[int | str, float]) -> None:
        for layer, value in values.items():
            self.metrics.threshold.labels(self.rank, layer).set(value)


def _furthest(now: Any, before: Any) -> Any:
    if not isinstance(now, list):
        return max(now, before)
    return [max(pair) for pair in zip(now, before or [0] * len(now), strict=True)]


def thresholds_of(gate: Any) -> dict[int | str, float]:
    """By layer; a gate with one for all layers has it under "all"."""
    limit = getattr(gate, "limit", None)
    if isinstance(limit, torch.Tensor):
        return {"all": float(limit)}
    if hasattr(gate, "checkpoints"):
        return dict(zip(gate.checkpoints, gate.limits.tolist(), strict=True))
    return {}


def ratio(now: dict[str, Any], session: Session) -> float:
    return sum(now["skipped"]) / max(1, now["tokens"] * len(session.layers))


def line(now: dict[str, Any], session: Session) -> str:
    """What the log says every SEDAC_LOG_EVERY steps, at most once a second."""
    text = (
        f"sedac: {now['steps']} steps, {now['tokens']} tokens, {ratio(now, session):.1%} of MLPs skipped, "
        f"exits {sum(now['exits'])}"
    )
    if now["thresholds"]:
        text += ", thresholds " + ", ".join(f"{layer}: {value:.4g}" for layer, value in now["thresholds"].items())
    if now["seconds"]:
        text += f", {now['seconds'] / max(1, now['steps']) * 1e3:.2f} ms a step deciding"
    return text
