"""What a machine may lack for the kernels: the graph engine says what to install, `auto` falls back, and eager packs on the host."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from machines import machine  # noqa: F401 - a fixture

from sedac_cli.errors import InputError, UsageError
from sedac_cli.gpu.choose import runs
from sedac_cli.gpu.packed import PackedMlp
from sedac_cli.runtime import engines, on_device
from sedac_cli.runtime.engines import generate_with, require_engine
from sedac_cli.runtime.generate import GenerateOptions
from sedac_cli.runtime.graph.capture import require_graphs
from sedac_cli.runtime.on_device import OnDevice
from sedac_cli.runtime.plan import make_plan

CUDA = torch.device("cuda")
LACKS = {
    "no CuPy": ({"cupy": None}, r"need CuPy \(.*\): pip install cupy-cuda13x"),
    "CuPy of another CUDA": ({"cupy": 12}, r"built for CUDA 12: pip uninstall -y cupy-cuda12x && pip install cupy-cuda13x"),
    "two CuPys": (
        {"cupy": 12, "packages": ("cupy-cuda12x", "cupy-cuda13x")},
        r"pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install cupy-cuda13x",
    ),
    "torch without CUDA": ({"cuda": None}, "not built for CUDA"),
    "an old GPU": ({"capability": (7, 5)}, r"Pretended GPU has compute capability 7.5: the kernels need 8.0"),
    "an old driver": ({"driver": 12020}, r"need CUDA 12.4 or newer; this driver has 12.2"),
    "no cuda-bindings": ({"bindings": False}, r"need cuda-bindings \(.*\): pip install 'cuda-bindings==13\.\*'"),
}  # fmt: skip
PACKS_ANYWAY = {"an old driver", "no cuda-bindings"}


@pytest.fixture(params=LACKS)
def lacking(request, machine):  # noqa: F811
    changes, said = LACKS[request.param]
    machine(**changes)
    return request.param, said


def test_the_graph_engine_says_what_is_missing(lacking):
    with pytest.raises(InputError, match=lacking[1]) as caught:
        require_graphs(CUDA)
    assert caught.value.hint == "--engine eager (of sedac serve: --backend eager) needs none of this"
    with pytest.raises(InputError, match=lacking[1]):
        require_engine("graph", "auto")
    require_engine("auto", "auto")


def test_a_machine_that_lacks_nothing(machine):  # noqa: F811
    machine()
    require_graphs(CUDA)


def on_a_gpu(tiny, monkeypatch, width=4):
    """As far as `generate_with` asks, the model is on a GPU; the eager engine is a stub."""
    monkeypatch.setattr(engines, "encode_prompts", lambda *given: {"input_ids": torch.zeros(1, width).long()})
    monkeypatch.setattr(engines, "generate", lambda *given, **more: "eager's")
    return SimpleNamespace(model=tiny.model, decoder=tiny.decoder, device=CUDA)


def test_auto_falls_back_and_says_why(lacking, tiny, monkeypatch):
    loaded, plan = on_a_gpu(tiny, monkeypatch), make_plan("never", tiny.decoder)
    result, used = generate_with("auto", loaded, plan, ["the sea"], GenerateOptions(max_new_tokens=4))
    assert (result, used.name) == ("eager's", "eager")
    (note,) = used.notes
    assert note.startswith("the graph engine could not serve this: ")
    with pytest.raises(InputError, match=lacking[1]):
        generate_with("graph", loaded, plan, ["the sea"], GenerateOptions(max_new_tokens=4))


@pytest.mark.parametrize("engine", ["auto", "graph"])
def test_too_many_tokens_are_refused_before_there_is_an_engine(engine, tiny, monkeypatch):
    loaded = on_a_gpu(tiny, monkeypatch, width=126)
    monkeypatch.setattr("sedac_cli.runtime.graph.GraphEngine", None)
    with pytest.raises(InputError, match="a prompt of 126 tokens and 4 new ones exceed the model's 128 positions"):
        generate_with(engine, loaded, make_plan("never", tiny.decoder), ["the sea"], GenerateOptions(max_new_tokens=4))


def test_a_misspelt_engine():
    with pytest.raises(UsageError, match=r"--engine: 'garph' is not known. Did you mean 'graph'\?"):
        require_engine("garph", "auto")


def packing(tiny, monkeypatch):
    """What would pack the rows of layer 0 on a GPU, if anything does."""
    weight = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(PackedMlp, "of", lambda mlp, activation: PackedMlp(weight, weight, weight, activation))
    plan = make_plan("always:2", tiny.decoder)
    return OnDevice.of(tiny.decoder.branches[0], plan.gate, plan.standin)


def test_rows_are_packed_by_the_host_where_kernels_cannot_run(lacking, tiny, monkeypatch, caplog):
    name, said = lacking
    with caplog.at_level(logging.WARNING, "sedac"):
        found = [packing(tiny, monkeypatch) for _ in range(3)]
    if name in PACKS_ANYWAY:
        assert None not in found
        assert not caplog.records
        return
    assert found == [None] * 3
    (record,) = caplog.records  # once, however many layers ask
    assert f"passes of {on_device.PACK_FROM} rows and more wait for the host on cuda:0" in record.getMessage()
    assert re.search(said, record.getMessage())


def test_rows_are_packed_on_a_gpu_where_they_can(machine, tiny, monkeypatch, caplog):  # noqa: F811
    machine()
    assert packing(tiny, monkeypatch) is not None
    assert not caplog.records


def test_logits_are_read_by_plain_torch_where_the_kernel_cannot_run(lacking, caplog):
    name, said = lacking
    with caplog.at_level(logging.WARNING, "sedac"):
        found = [runs(torch.device("cuda", 0)) for _ in range(3)]
    if name == "an old driver":  # it lacks conditional nodes, and there are none in this
        assert (found, caplog.records) == ([True] * 3, [])
        return
    assert found == [False] * 3
    (record,) = caplog.records
    assert "plain torch reads logits for their entropy on cuda:0" in record.getMessage()
    assert re.search(said, record.getMessage())
