"""Packed rows on a GPU: only the rows that stay meet the MLP, the others their stand-in, and all come back in their places."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, counters_come_back  # noqa: F401 - one is a fixture
from conftest import save_tiny, words

from sedac_cli.config import ModelSpec
from sedac_cli.gpu.packed import PackedMlp, activate_rows
from sedac_cli.models import load_model
from sedac_cli.runtime import on_device
from sedac_cli.runtime.skip import skipping
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("counters_come_back"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels cannot run here"),
]


class Mlp(torch.nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        make = {"bias": False, "device": "cuda", "dtype": torch.bfloat16}
        self.gate_proj, self.up_proj = (torch.nn.Linear(width, inner, **make) for _ in range(2))
        self.down_proj = torch.nn.Linear(inner, width, **make)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("rows", [1, 7, 600, 4096])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rank", [0, 16])
@torch.inference_mode()
def test_packed_mlp(rows, share, rank):
    mlp = Mlp(256, 512)
    packed = PackedMlp.of(mlp, "silu")
    x = torch.randn(rows, 256, device="cuda").bfloat16()
    leave = torch.rand(rows, device="cuda") < share
    standin = None
    expected = mlp(x).float()
    other = torch.zeros_like(expected)
    if rank:
        a, b, bias = (
            torch.randn(*shape, device="cuda").bfloat16() * 0.1 for shape in ((rank, 256), (256, rank), (256,))
        )
        standin = (a, b, bias)
        other = (torch.nn.functional.silu(x @ a.T) @ b.T + bias).float()
    found = packed(x, leave, standin).float()
    assert_close("rows", found, torch.where(leave.unsqueeze(1), other, expected), 0.02)


@pytest.mark.parametrize("count", [0, 3, 50])
def test_rows_behind_the_count_are_left_alone(count):
    both = torch.randn(50, 128, device="cuda").bfloat16()
    both[count:] = float("nan")
    for gate, up in (both.chunk(2, dim=1), [half.contiguous() for half in both.chunk(2, dim=1)]):
        found = activate_rows(gate, up, "gelu", torch.tensor([count], dtype=torch.int32, device="cuda"))
        expected = torch.nn.functional.gelu(gate[:count]) * up[:count]
        assert_close("rows", found[:count].float(), expected.float(), 0.02)


@pytest.mark.parametrize("gate", ["always:2", "random:0.4"])
def test_a_prompt_pass_packs_without_the_host(tmp_path, monkeypatch, gate):
    folder = save_tiny(tmp_path, hidden_size=64, max_position_embeddings=1024)
    loaded = load_model(ModelSpec(ref=str(folder), device="cuda", dtype="bfloat16"))
    standin = LowRankStandIns({layer: LowRank(64, 16).requires_grad_(False) for layer in range(4)})
    for module in standin.by_layer.values():
        for p in module.parameters():
            torch.nn.init.normal_(p, 0, 0.1)
    ids = loaded.tokenizer(words(160), return_tensors="pt")["input_ids"][:, :600].cuda()
    logits, packed, call = {}, [], PackedMlp.__call__
    monkeypatch.setattr(PackedMlp, "__call__", lambda mlp, *args: (packed.append(mlp), call(mlp, *args))[1])
    for name, limit in (("packed", 1), ("host", 10**9)):
        monkeypatch.setattr(on_device, "PACK_FROM", limit)
        with torch.inference_mode(), skipping(loaded.model, gate, standin, decoder=loaded.decoder) as run:
            logits[name] = loaded.model(input_ids=ids, use_cache=False).logits.float()
        logits[name + " ratio"] = run.skip_ratio
        assert bool(packed) == (name == "packed")
        packed.clear()
    assert logits["packed ratio"] == logits["host ratio"] > 0
    assert float((logits["packed"] - logits["host"]).norm() / logits["host"].norm()) < 0.05
