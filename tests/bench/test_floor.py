"""The floor of a decode step, against bytes counted by hand."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from conftest import save_tiny

from sedac_cli.bench import machine
from sedac_cli.bench.backends import Cell, hf
from sedac_cli.bench.backends.hf import GraphSession
from sedac_cli.bench.floor import StepReads, read_bandwidth
from sedac_cli.bench.metrics import Run, summarize
from sedac_cli.bench.tables import tables
from sedac_cli.gates.learned import LearnedGate, Router
from sedac_cli.gates.simple import NeverGate
from sedac_cli.models import load_model
from sedac_cli.runtime.graph import GraphEngine
from sedac_cli.runtime.plan import Plan, make_plan
from sedac_cli.standins import ZeroStandIn
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns

# The `tiny` model: 4 layers of hidden 32, intermediate 48, 4 heads and 2 key-value heads of 8; float32.
MLP = 3 * 32 * 48 * 4
ATTENTION = (32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32) * 4  # q with bias, k and v with bias, o
NORMS = 2 * 32 * 4
POSITION = 2 * 2 * 8 * 4  # in one layer


@pytest.fixture
def head(tiny):
    return tiny.decoder.vocab_size * 32 * 4


def test_what_a_step_reads(tiny, head):
    reads = StepReads.of(tiny, Plan(NeverGate(4), ZeroStandIn()))
    assert reads.mlp == (MLP,) * 4
    assert reads.standin == (0,) * 4
    assert reads.always == 4 * (ATTENTION + NORMS) + head
    assert reads.position == POSITION
    assert reads.windows == (0,) * 4


def test_deciding_and_standing_in_are_read_too(tiny, head):
    routers = {layer: Router(32, 2) for layer in range(4)}
    standins = LowRankStandIns({layer: LowRank(32, 6) for layer in range(4)})
    reads = StepReads.of(tiny, Plan(LearnedGate(4, routers, 0.0), standins))
    assert reads.standin == (2 * 6 * 32 * 4,) * 4
    router = (32 + 1 + 2 * 32 + 2) * 4
    assert reads.always == 4 * (ATTENTION + NORMS + router) + head


def test_steps_add_up():
    reads = StepReads(always=100, mlp=(10, 20), standin=(1, 2), position=3, windows=(0, 7))
    ran = torch.tensor([[True, True], [True, False], [False, False]])
    # Rows of 4 and 6 positions: 5 + 7, 6 + 8 and 7 + 9 are read by the first layer, of more than 7 the last 7 by the second.
    assert reads.bytes_of(ran, [4, 6]) == 300 + (30 + 10 + 2 + 1 + 2) + 3 * (12 + 14 + 16) + 3 * (12 + 13 + 14)
    assert reads.bytes_of(ran[:0], [4, 6]) == 0


def test_experts_of_one_token_only(tmp_path):
    folder = save_tiny(tmp_path / "m", "mixtral", num_local_experts=4, num_experts_per_tok=1)
    loaded = load_model(str(folder))
    reads = StepReads.of(loaded, Plan(NeverGate(4), ZeroStandIn()))
    experts = 4 * 3 * 32 * 48 * 4
    whole = sum(p.numel() * 4 for p in loaded.decoder.branches[0].entry.parameters())
    assert reads.mlp[0] == whole - experts + experts // 4


def test_a_window_is_all_that_its_layer_reads(tmp_path):
    folder = save_tiny(tmp_path / "m", "mistral", sliding_window=16)
    reads = StepReads.of(load_model(str(folder)), Plan(NeverGate(4), ZeroStandIn()))
    assert reads.windows == (16,) * 4
    ran = torch.ones(3, 4, dtype=torch.bool)
    weights = 3 * (reads.always + sum(reads.mlp))
    assert reads.bytes_of(ran, [14, 40]) == weights + 4 * POSITION * ((15 + 16 + 16) + 3 * 16)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_session_of_the_graph_engine_tells_its_floor(tiny, monkeypatch, rows):
    monkeypatch.setattr(hf, "GraphEngine", partial(GraphEngine, capture=False))
    plan = make_plan("always:2", tiny.decoder, tiny.identity)
    session = GraphSession(tiny, plan, Cell(rows, 24, 5), bandwidth=1e6)
    run = session.run(["the sea"] * rows, 5)
    length = run.prompt_tokens // rows
    step = session.reads.always + 2 * MLP
    expected = sum(step + rows * (length + n) * 4 * POSITION for n in (1, 2, 3, 4)) / 1e6
    assert run.floor_seconds == pytest.approx(expected)
    found = summarize([run])["floor"]
    assert found["step_seconds"] == pytest.approx(expected / 4)
    assert found["took_seconds"] == pytest.approx(run.decode_seconds / 4)
    assert found["share"]["median"] == pytest.approx(expected / run.decode_seconds)
    assert GraphSession(tiny, plan, Cell(rows, 24, 5), None).run(["the sea"] * rows, 5).floor_seconds is None


def made(**values) -> Run:
    return Run(2.0, 10, 5, 0.5, 1.0, [0.5], [0.1], **values)


def first_rows(*runs):
    """Of each table of a document with these runs alone: the first row, and what stands under the table."""
    cell = {"label": "batch 1", **summarize(runs)}
    document = {"configurations": [{"name": "dense", "cells": [cell], "quality": None, "errors": []}], "baseline": "x",
                "subject": {"read_bytes_per_second": 4e12}, "matrix": {"dataset": "x"}, "random_weights": False}  # fmt: skip
    return {
        table.title: (dict(zip(table.columns, table.rows[0], strict=True)), table.caption) for table in tables(document)
    }


def test_a_table_of_steps_stands_only_where_it_is_known():
    row, caption = first_rows(made(floor_seconds=0.25))["decode step and its floor"]
    assert (row["step"], row["step floor"], row["of floor"]) == ("250.000 ms", "62.500 ms", "25.0%")
    assert "4.00 TB/s" in caption
    unknown = first_rows(made())
    assert "speed" in unknown
    assert "decode step and its floor" not in unknown
    assert "TB/s" not in unknown["speed"][1]


def test_a_card_at_its_power_limit_is_told_under_the_speeds():
    under = first_rows(made(at_power_limit=True), made(at_power_limit=False), made(at_power_limit=True))["speed"][1]
    assert "At the end of 2 of 3 runs the GPU was at its power limit" in under
    for runs in ([made(at_power_limit=False)], [made()]):
        assert "power" not in first_rows(*runs)["speed"][1]


def test_no_bandwidth_without_a_gpu():
    assert read_bandwidth(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_bandwidth_of_this_gpu_is_a_gpu_s():
    assert 1e11 < read_bandwidth(torch.device("cuda")) < 2e13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_bench_of_a_shape(sedac, tmp_path):
    """A model without weights: speeds beside the floor, and no page that does not say what the weights are. It stands here because
    times are asked about: in a file of many tests others would be using the GPU."""
    result = sedac(
        "bench", "--shape", "qwen2.5-0.5b", "--engine", "graph", "--batch", "1,8", "--gates", "always:12,random:0.25",
        "--prompt-lengths", 32, "--new-tokens", 129, "--repeats", 3, "--warmup", 1, "--save-dir", tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["random_weights"] is True
    names = [c["name"] for c in found["configurations"]]
    assert names == ["dense", "always:12", "random:0.25"]
    for configuration in found["configurations"]:
        assert [(cell["batch"], cell["engine"]) for cell in configuration["cells"]] == [(1, "graph"), (8, "graph")]
        assert configuration["errors"] == []
        for cell in configuration["cells"]:
            assert 0.05 < cell["floor"]["share"]["median"] < 1
            runs = [sample["at_power_limit"] for sample in cell["samples"]["own"]]
            assert all(found is not None for found in runs) == (machine.nvml_of(0) is not None)
            assert cell["at_power_limit"] == (machine.nvml_of(0) and {"runs": sum(runs), "of": len(runs)})
    for cell in found["configurations"][0]["cells"]:
        assert cell["aside"]["step_seconds"] > cell["floor"]["took_seconds"]
    assert "Side note, no baseline: eager generate()" in " ".join(result.out.split())
    rate = found["subject"]["read_bytes_per_second"]
    dense, half = (found["configurations"][i]["cells"] for i in (0, 1))
    for whole, part in zip(dense, half, strict=True):
        assert part["skip_ratio"] == 0.5
        spared = (whole["floor"]["step_seconds"] - part["floor"]["step_seconds"]) * rate
        assert spared == pytest.approx(12 * 3 * 896 * 4864 * 2, rel=1e-6)  # twelve MLPs in bfloat16
    assert half[0]["decode_speedup"]["median"] > 1.1
    assert "(random weights)" in result.out
    assert "random weights" in (tmp_path / "report.md").read_text()
    assert "The weights of this model are random" in (tmp_path / "report.html").read_text()
