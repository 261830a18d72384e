"""The norm ahead of an MLP: found in vLLM's own models, and the same model with an operator in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import save_tiny, tiny_config
from offline import join_norms
from torch import nn
from vllm_helpers import SIZE, save_gates

from sedac_cli.vllm.norms import MlpNorm, norm_ahead
from sedac_cli.vllm.session import Session
from sedac_cli.vllm.surgery import Layer, find_layers

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

# Where it is, and whether the weight is stored less one. None: the rows are scaled ahead of the norm, which gets no residual
# (granite), or the norm is none of these (phi, whose MLP stands beside its attention).
FAMILIES = {
    "qwen2": ("post_attention_layernorm", False),
    "qwen3": ("post_attention_layernorm", False),
    "llama": ("post_attention_layernorm", False),
    "mistral": ("post_attention_layernorm", False),
    "gemma": ("post_attention_layernorm", True),
    "gemma2": ("pre_feedforward_layernorm", True),
    "gemma3_text": ("pre_feedforward_layernorm", True),
    "glm4": ("post_attention_layernorm", False),
    "granite": None,
    "phi": None,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_norm_ahead_of_an_mlp_is_found(name, tmp_path):
    layers = find_layers(built(name, tmp_path), 2)
    assert len(layers) == 2
    for layer in layers:
        before = [dict(vars(part)) for part in layer.module.children()]
        found, known = norm_ahead(layer), MlpNorm.of(layer)
        assert [dict(vars(part)) for part in layer.module.children()] == before, "the parts are as they were"
        if FAMILIES[name] is None:
            assert found is None
            assert known is None
            continue
        part, plus_one = FAMILIES[name]
        assert found is getattr(layer.module, part)
        assert known is not None
        assert known.weight.data_ptr() == found.weight.data_ptr()
        assert (known.plus_one, known.eps) == (plus_one, found.variance_epsilon)


def built(name: str, folder: Path) -> nn.Module:
    """vLLM's model of a family, two layers, without an engine around it."""
    from transformers import AutoModelForCausalLM
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    config = tiny_config(name, **SIZE, num_hidden_layers=2)
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)
    engine = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, load_format="dummy", dtype="float32", max_model_len=128,
        enforce_eager=True,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(engine):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{folder}/meet", 0, "gloo")
            initialize_model_parallel(1, 1)
        return initialize_model(engine)


class Odd(nn.Module):
    """Layers that do something else with what the norm gives."""

    def __init__(self, layer: Layer, what: str):
        super().__init__()
        self.norm, self.mlp, self.what = norm_ahead(layer), layer.mlp, what

    def forward(self, hidden_states, residual, more=None):
        if self.what == "no residual":
            return self.mlp(self.norm(hidden_states + residual)), residual
        hidden_states, residual = self.norm(hidden_states, residual)
        if self.what == "scaled":
            hidden_states = hidden_states * 2
        elif self.what == "scaled in place":
            hidden_states *= 2
        elif self.what == "the other result":
            hidden_states, residual = residual, hidden_states
        elif self.what == "twice":
            self.norm(hidden_states, residual)
        elif self.what == "asks more":
            hidden_states = more.rows(hidden_states)
        return self.mlp(hidden_states), residual


@pytest.mark.parametrize(
    "what", ["", "no residual", "scaled", "scaled in place", "the other result", "twice", "asks more"]
)
def test_a_layer_that_does_anything_else_is_left_alone(family, what):
    engine, _ = family
    engine.gate(None)
    layer = find_layers(engine.worker.model_runner.get_model(), 4)[1]
    odd = Odd(layer, what)
    assert norm_ahead(Layer(1, odd, odd.mlp, 0, 1)) is (None if what else odd.norm)


def test_the_operator_is_the_norm_to_the_bit(family, tmp_path, monkeypatch):
    engine, loaded = family
    save_gates(tmp_path / "gates.pth", loaded)
    spec = f"learned:{tmp_path}/gates.pth@0.4"
    plain = engine.gate(spec)
    expected = engine.run()
    assert plain.norms == {}
    calls = []
    original = Session.norm
    monkeypatch.setattr(Session, "join_norms", join_norms)
    monkeypatch.setattr(Session, "norm", lambda self, layer, *rows: calls.append(layer) or original(self, layer, *rows))
    session = engine.gate(spec)
    assert session.status()["norms"] == [1, 2, 3]
    assert engine.run() == expected
    assert session.status()["skipped"] == plain.status()["skipped"]
    assert len(calls) >= 3 * 8
    assert set(calls) == {1, 2, 3}
    engine.gate(None)
    calls.clear()
    engine.run()
    assert not calls, "a norm that was given back"


def test_the_operator_in_a_compiled_model(tmp_path):
    from test_vllm_engines import cached_graphs, expected, offline

    from sedac_cli.models import load_model

    folder = save_tiny(tmp_path / "tiny", "qwen2", **SIZE)
    loaded = load_model(str(folder))
    save_gates(tmp_path / "gates.pth", loaded)
    spec = f"learned:{tmp_path}/gates.pth@0.4"
    cache = tmp_path / "cache"
    environment = {
        "VLLM_CACHE_ROOT": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "VLLM_CPU_CI_ENV": "0",
    }  # fmt: skip
    found = offline(folder, {"gate": spec}, environment, join_norms=True, enforce_eager=False)
    assert cached_graphs(cache), "nothing was compiled: this test would show nothing"
    want, run = expected((loaded, folder, None), spec)
    assert found["rounds"] == [want]
    assert found["normed"] == found["status"][0]["norms"] == [1, 2, 3]
    assert found["status"][0]["skipped"] == run.skipped_per_layer
