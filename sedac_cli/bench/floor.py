"""The least time decode steps can take: the bytes they had to read, at the bandwidth with which this GPU reads.

What a step reads: the weights of everything that ran in it (every layer's attention, the MLPs that ran, the stand-ins of those
that did not, the gate, the head), and the keys and values of all positions so far, in layers with a sliding window of those
within it. Activations stay in caches and are left out; of mixture-of-experts blocks only the experts that one token visits are
counted.

    reads = StepReads.of(loaded, plan)
    seconds = reads.bytes_of(ran, lengths=[64]) / read_bandwidth(loaded.device)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sedac_cli.costs import visited_share
from sedac_cli.gates.base import Gate
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.graph.standard import windows_of
from sedac_cli.runtime.plan import Plan

PROBE_BYTES = 2**31
ROUNDS, IN_A_ROW = 6, 16


def read_bandwidth(device: torch.device) -> float | None:
    """Bytes per second of reading 2 GiB, the best of several rounds; None where there is no GPU to ask. Whatever slows the reading
    flatters every share of a floor: so reductions in a row, whose launches hide behind each other, and of int64, which torch reduces
    fastest (one H200: 4.49 TB/s, of int32 and float32 4.40)."""
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0]
    x = torch.ones(min(PROBE_BYTES, free // 4) // 8, dtype=torch.int64, device=device)
    best = 0.0
    with torch.cuda.device(device):
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(IN_A_ROW):
                x.amax()
            end.record()
            end.synchronize()
            best = max(best, IN_A_ROW * x.numel() * x.element_size() / begin.elapsed_time(end) * 1e3)
    del x
    torch.cuda.empty_cache()
    return best


@dataclass(frozen=True)
class StepReads:
    """Bytes. `always`: read by every step; `mlp[l]` if that MLP ran, `standin[l]` if not; `position`: keys and values of one
    in one layer; `windows[l]`: how many of the last positions are read there, 0 for all."""

    always: int
    mlp: tuple[int, ...]
    standin: tuple[int, ...]
    position: int
    windows: tuple[int, ...]

    @classmethod
    def of(cls, loaded: LoadedModel, plan: Plan) -> StepReads:
        decoder, config = loaded.decoder, loaded.model.config.get_text_config()
        width = loaded.model.dtype.itemsize
        mlps = [(branch.entry, branch.exit) for branch in decoder.branches]
        layers = _weights(decoder.layers) - sum(_weights(mlp) for mlp in mlps)
        # A multiply-add for a single token is a weight that is read.
        standins = [plan.standin.cost_per_token(layer) / 2 * width for layer in range(decoder.num_layers)]
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            always=layers
            + _weights([loaded.model.get_output_embeddings()])
            + _of_gate(plan.gate, decoder.hidden_size, width),
            mlp=tuple(_weights(mlp, visited_share(config)) for mlp in mlps),
            standin=tuple(map(round, standins)),
            position=2 * heads * size * width,
            windows=tuple(windows_of(decoder)),
        )

    def bytes_of(self, ran: Tensor, lengths: Sequence[int]) -> int:
        """Of consecutive steps: `ran` [steps, layers]; `lengths`: each row's positions before the first."""
        steps = ran.shape[0]
        ran = ran.to("cpu", torch.long)
        mlps = int((ran.sum(dim=0) * torch.tensor(self.mlp)).sum())
        standins = int(((1 - ran).sum(dim=0) * torch.tensor(self.standin)).sum())
        at = torch.tensor(lengths).unsqueeze(1) + torch.arange(1, steps + 1)
        seen = sum(
            n * int((at.clamp_max(window) if window else at).sum()) for window, n in Counter(self.windows).items()
        )
        return steps * self.always + mlps + standins + seen * self.position


def _of_gate(gate: Gate, hidden_size: int, width: int) -> int:
    """Routers and probes as they are; of a rule without any (a look through the output head) what its arithmetic reads."""
    parts = [part for name in ("routers", "probes") for part in getattr(gate, name, {}).values()]
    return _weights(parts) if parts else round(sum(gate.cost_per_token(hidden_size).values()) / 2 * width)


def _weights(modules: Iterable[nn.Module], of_experts: float = 1.0) -> int:
    """Bytes of every weight once; of experts the given share."""
    found: dict[int, float] = {}
    for module in modules:
        for name, weight in module.named_parameters():
            expert = "experts" in name.split(".") and "shared" not in name
            found[id(weight)] = weight.numel() * weight.element_size() * (of_experts if expert else 1.0)
    return round(sum(found.values()))
