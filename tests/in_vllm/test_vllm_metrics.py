"""What Prometheus is told is, once all is quiet, exactly what was counted: also when the thread read in the middle of a step."""

from __future__ import annotations

import logging
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


def test_values_go_where_the_environment_says_when_they_are_made(tmp_path, monkeypatch, caplog):
    """A worker of Ray's imports prometheus_client before it hears of the folder; on another machine there is none."""
    from prometheus_client import CollectorRegistry, Counter, values

    from sedac_cli.vllm.metrics import share_values

    def written(name):
        share_values()
        Counter(name, "text", registry=CollectorRegistry()).inc()
        return [path.name.split("_")[0] for path in tmp_path.iterdir()]

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM, once imported, keeps its lines to itself
    monkeypatch.setattr(values, "ValueClass", values.MutexValue)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert written("without") == []
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(values, "ValueClass", values.MultiProcessValue())
    assert written("elsewhere") == []
    assert "is no folder here" in caplog.text
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert written("here") == ["counter"]
