"""What the engines of the benchmark load: the shape of a known model with random weights, and gates whose outcome is known.

`by_layer.pth` has a router for every layer, made so that every fourth always skips: its decisions are those of forced flags.
`by_token.pth` has routers of random weights: which tokens skip depends on their states, and a threshold sets how many.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
COMMON = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": COMMON | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "tiny": COMMON | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024,
    },
}  # fmt: skip
SHARE = 0.25
RANK = 192
"""Of stand-ins: as wide as those whose quality docs/distillation.md reports."""


def spread(layers: int, share: float) -> list[int]:
    """Evenly: 25 % is every fourth layer, 50 % every second."""
    return [i for i in range(layers) if int((i + 1) * share + 1e-9) > int(i * share + 1e-9)]


def checkpoints(layers: int) -> list[int]:
    return [layers // 4, layers // 2, 3 * layers // 4]


def make_work(work: Path, shape: dict[str, Any]) -> None:
    (work / "model").mkdir(parents=True)
    (work / "model" / "config.json").write_text(json.dumps(shape))
    site = work / "site" / "sedac-0.dist-info"  # so that vLLM finds the plugin of this checkout
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: sedac\nVersion: 0\n")
    (site / "entry_points.txt").write_text("[vllm.general_plugins]\nsedac = sedac_cli.vllm.plugin:register\n")


def make_artifacts(work: Path, shape: dict[str, Any]) -> None:
    """Probes and gates files of real size."""
    import torch

    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from sedac_cli.artifacts.gates_file import GatesFile
    from sedac_cli.artifacts.manifest import ModelIdentity
    from sedac_cli.artifacts.tensors import save_tensors
    from sedac_cli.gates.learned import Router
    from sedac_cli.models import ARCHITECTURE_KEYS
    from sedac_cli.probes import LREProbe, probe_name
    from sedac_cli.standins.lowrank import LowRank

    torch.manual_seed(0)
    layers, width = shape["num_hidden_layers"], shape["hidden_size"]
    for layer in checkpoints(layers):
        save_tensors(work / probe_name(layer), LREProbe(width, 64).state_dict())
    identity = ModelIdentity(
        ref="random", architecture={key: shape.get(key) for key in ARCHITECTURE_KEYS}, config_digest="", tokenizer_digest="",
        dtype="bfloat16", weights_sample=[],
    )  # fmt: skip
    off = spread(layers, SHARE)
    rank = min(RANK, width // 2)

    def write(name: str, known: bool, standing_in: bool) -> None:
        routers, standins = {}, {}
        for layer in range(layers):
            router = Router(width, 16).requires_grad_(False)
            router.inner.normal_(0, width**-0.5)
            if known:
                router.bias.fill_(1e6 if layer in off else -1e6)
            else:
                router.weight.normal_(0, width**-0.5)
                router.outer.normal_()
            routers[layer] = router.state_dict()
            if standing_in:
                low = LowRank(width, rank).requires_grad_(False)
                low.a.normal_(0, width**-0.5)
                standins[layer] = low.state_dict()
        curve = [{"share": SHARE, "limit": 0.0}]
        made = GatesFile("learned", identity, 0, routers, standins, curve, {"options": {"target_skip": SHARE}})
        made.write(work / name)

    write("by_layer.pth", True, True)
    write("by_layer_zero.pth", True, False)
    write("by_token.pth", False, False)
