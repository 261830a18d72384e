"""Adapters (LoRA) of a small model, on attention and MLP alike; random weights, written as peft writes them, and beside each the
model that has it added to its weights. The GPU benchmark uses them as well.

    save_adapter(folder, tmp_path / "adapter1", tmp_path / "merged1", seed=1)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 8
TARGETS = {"q_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


def save_adapter(base: Path, adapter: Path, merged: Path, seed: int) -> None:
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    generator = torch.Generator().manual_seed(seed)
    weights, parts = load_file(base / "model.safetensors"), {}
    for layer in range(layers):
        for name, block in TARGETS.items():
            path = f"model.layers.{layer}.{block}.{name}"
            weight = weights[path + ".weight"]
            a = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            b = torch.randn(weight.shape[0], RANK, generator=generator) * 0.3
            parts |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
            weights[path + ".weight"] = weight + ALPHA / RANK * b @ a
    adapter.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS),
        "bias": "none", "base_model_name_or_path": str(base),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(base, merged)
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
