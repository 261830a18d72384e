"""Models whose linear layers are quantized: the gate wraps whatever their MLPs launch, and rows that skip stay out of it.

Reference: the same rounded weights (and inputs) under the Hugging Face runtime with the same gate.
"""

from __future__ import annotations

import pytest
import torch
from conftest import save_tiny
from quantize import KINDS, rounding_inputs
from vllm_helpers import SIZE, Engine, hugging_face, save_gates

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

INT4 = ("gptq", "awq")
TOLERANCE = 0.1
"""Of a log-probability. Seen: 0.07 (int8), 0.01 (fp8), 0.04 (int4 in half precision); a wrong MLP moves them by more than 1."""


def int4_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of vLLM for CPUs without AVX-512 load GPTQ and AWQ but lack the int4 kernel itself: its product, in torch."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel as Kernel
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32 as unpack

    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return

    def prepare(self, layer):
        weight, scales, zeros = self._get_weight_params(layer)
        codes = unpack(weight.data, self.config.weight_type, 0)
        groups = codes.shape[0] // scales.shape[0]
        zero = 8
        if self.config.zero_points:
            table = zeros.data.t().contiguous() if zeros.output_dim == 0 else zeros.data
            zero = unpack(table, self.config.weight_type, 1).repeat_interleave(groups, 0)
        layer.plain = ((codes - zero) * scales.data.float().repeat_interleave(groups, 0)).to(scales.dtype)

    def apply(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.plain.T, bias)

    monkeypatch.setattr(Kernel, "process_weights_after_loading", prepare)
    monkeypatch.setattr(Kernel, "apply_weights", apply)


def int8_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with AMX vLLM takes a kernel for half precision alone: the other one computes what is compared here."""
    monkeypatch.setattr("vllm.model_executor.kernels.linear.scaled_mm.cpu.check_cpu_sgl_kernel", lambda *shape: False)


@pytest.fixture(scope="module", params=KINDS)
def quantized(request, tmp_path_factory):
    """(kind, vLLM with a quantized model, the rounded model under Hugging Face)."""
    from sedac_cli.models import load_model

    folder = tmp_path_factory.mktemp(request.param)
    saved = KINDS[request.param](save_tiny(folder / "tiny", "qwen2", **SIZE), folder)
    loaded = load_model(str(saved.rounded))
    rounding_inputs(loaded.model, request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param in INT4:
            int4_in_torch(patch)
        elif request.param == "int8":
            int8_in_float32(patch)
        engine = Engine(saved.packed, dtype="float16" if request.param in INT4 else "float32")
        yield request.param, engine, loaded
        engine.close()


def compare(quantized, spec):
    from sedac_cli.vllm.plan import ModelShape, build_plan

    kind, engine, loaded = quantized
    tokens = 1 if kind in INT4 else 8  # in half precision the best of two near tokens may be the other
    session = engine.gate(spec)
    new, logprobs = engine.run(tokens=tokens)
    plan = build_plan(session.settings, ModelShape.of(engine.worker.model_config))
    their_new, theirs, run = hugging_face(loaded, plan, tokens=tokens)
    assert session.counters.skipped.tolist() == run.skipped_per_layer
    for mine, other in zip(logprobs, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), rtol=0, atol=TOLERANCE)
    if kind not in INT4:
        assert new == their_new
    return session, logprobs


def test_never_is_the_plain_quantized_model(quantized):
    kind, engine, _ = quantized
    engine.gate(None)
    method = type(engine.worker.model_runner.get_model().model.layers[0].mlp.down_proj.quant_method).__name__
    assert method == {"gptq": "AutoGPTQLinearMethod", "awq": "AutoAWQMarlinLinearMethod"}.get(
        kind, "CompressedTensorsLinearMethod"
    )
    plain = engine.run()
    engine.gate("never")
    assert engine.run() == plain


@pytest.mark.parametrize("spec", ["always:2", "forced:1/3"])
def test_mlps_are_skipped(quantized, spec):
    session, logprobs = compare(quantized, spec)
    assert session.status()["skip_ratio"] == pytest.approx(0.5)
    quantized[1].gate(None)
    dense = quantized[1].run(tokens=1)[1]
    assert max(abs(a - b) for a, b in zip(logprobs[0], dense[0], strict=False)) > 3 * TOLERANCE


def test_a_learned_gate_with_standins(quantized, tmp_path):
    save_gates(tmp_path / "gates.pth", quantized[2])
    session, _ = compare(quantized, f"learned:{tmp_path}/gates.pth@0.4")
    assert session.status()["standin"] == "LowRankStandIns"
    assert 0.05 < session.status()["skip_ratio"] < 0.95
