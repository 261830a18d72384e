"""What Prometheus is told is, once all is quiet, exactly what was counted: also when the thread read in the middle of a step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("prometheus_client")

LAYERS = 3


class Counting:
    """As much of a session as the reporter reads: a step adds to `skipped` layer by layer, after it was counted."""

    def __init__(self):
        self.settings = SimpleNamespace(log_every=0)
        self.device, self.gate = torch.device("cpu"), SimpleNamespace()
        self.gated, self.layers = [0, 1, 2], dict.fromkeys(range(LAYERS))
        zeros = torch.zeros(LAYERS, dtype=torch.long)
        self.counters = SimpleNamespace(steps=0, tokens=0, skipped=zeros.clone(), exits=zeros.clone(), seconds=0.0)
        self.open = False

    def settled(self):
        return not self.open

    def begin(self, tokens):
        self.open = True
        self.counters.steps += 1
        self.counters.tokens += tokens

    def layer(self, index, tokens):
        self.counters.skipped[index] += tokens


def values(metrics):
    return metrics.calls._value.get(), metrics.skipped._value.get()


def test_a_step_that_was_half_counted_is_counted_whole_afterwards():
    from sedac_cli.vllm.metrics import Reporter

    session = Counting()
    reporter = Reporter(session, rank=0, counts=True)
    calls, skipped = values(reporter.metrics)
    session.begin(5)
    session.layer(0, 5)
    reporter.tick(session)
    session.layer(1, 5)
    session.layer(2, 5)
    session.open = False
    reporter.tick(session)
    reporter.tick(session)
    assert values(reporter.metrics) == (calls + 5, skipped + 15)


def test_a_count_that_seems_to_shrink_is_not_told_twice():
    """On CUDA what ran is known before what was seen: in the middle of a step less seems skipped than before."""
    from sedac_cli.vllm.metrics import Reporter

    session = Counting()
    reporter = Reporter(session, rank=0, counts=True)
    calls, skipped = values(reporter.metrics)
    for seen in (10, 7, 12):
        session.begin(4)
        session.counters.skipped[0] = seen
        reporter.tick(session)
    assert values(reporter.metrics) == (calls + 12, skipped + 12)
