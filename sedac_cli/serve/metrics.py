"""Prometheus metrics of one server. Tokens are counted where they enter the model, so calls and exits are of one kind:
`sedac_exits_total / sedac_calls_total` is the share of tokens that skipped an MLP.

metrics = Metrics(num_layers=28); metrics.text()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BITS = (0.01, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12)


class Metrics:
    def __init__(self, num_layers: int, gate: str = "", model: str = ""):
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.num_layers = num_layers
        on: Any = {"registry": self.registry}
        info = Gauge("sedac_info", "Always 1; which model and gate are served.", ["model", "gate"], **on)
        info.labels(model, gate).set(1)
        self.calls = Counter("sedac_calls_total", "Tokens the gate decided about.", ["phase"], **on)
        self.exits = Counter("sedac_exits_total", "Tokens by the first layer whose MLP they skipped.", ["layer"], **on)
        self.mlps = Counter("sedac_mlps_total", "(token, layer) MLPs a dense model would have run.", **on)
        self.skipped = Counter("sedac_mlps_skipped_total", "(token, layer) MLPs that were not run.", **on)
        ratio = Gauge("sedac_skip_ratio", "sedac_mlps_skipped_total / sedac_mlps_total.", **on)
        ratio.set_function(lambda: self.skip_ratio)
        self.requests = Counter("sedac_requests_total", "Requests by how they ended.", ["endpoint", "outcome"], **on)
        self.prompt_tokens = Counter("sedac_prompt_tokens_total", "Prompt tokens read.", **on)
        self.new_tokens = Counter("sedac_generated_tokens_total", "Tokens generated.", **on)
        self.batches = Counter("sedac_batches_total", "Batches run.", **on)
        self.entropy = Histogram("sedac_entropy_bits", "Entropy of generated tokens.", buckets=BITS, **on)
        self.latency = Histogram(
            "sedac_request_seconds", "Arrival to end of a request.", ["endpoint"], buckets=SECONDS, **on
        )
        self.first = Histogram(
            "sedac_first_token_seconds", "Arrival to first token of a sequence.", buckets=SECONDS, **on
        )
        self.waited = Histogram("sedac_queue_seconds", "Arrival to start of a sequence.", buckets=SECONDS, **on)
        self.waiting = Gauge("sedac_waiting", "Sequences in the queue.", **on)
        self.running = Gauge("sedac_running", "Sequences that run.", **on)
        self.open = Gauge("sedac_open_requests", "Requests being answered.", **on)
        self._skipped = self._all = 0
        for phase in ("prefill", "decode"):
            self.calls.labels(phase)
        for layer in range(num_layers):
            self.exits.labels(str(layer))

    @property
    def skip_ratio(self) -> float:
        return self._skipped / self._all if self._all else 0.0

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        self.waiting.set_function(waiting)
        self.running.set_function(running)

    def decided(self, phase: str, tokens: int, skipped: int, exits: dict[int, int]) -> None:
        """Tokens that went into the model, what they skipped, and where they left. Called by one thread."""
        self.calls.labels(phase).inc(tokens)
        self.mlps.inc(tokens * self.num_layers)
        self.skipped.inc(skipped)
        self._skipped += skipped
        self._all += tokens * self.num_layers
        for layer, count in exits.items():
            self.exits.labels(str(layer)).inc(count)

    def text(self) -> bytes:
        return generate_latest(self.registry)
