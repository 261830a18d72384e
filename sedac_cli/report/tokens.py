"""What a gate does to each token of a real text: the data behind the heat map, kept as `tokens.json`.

Always true: the decisions are those of the runtime that skips, not of a simulation; the dense pass is made beside it, so
every token has both probabilities.

    document = read_tokens(loaded, make_plan("always:14", loaded.decoder), "always:14", ids, {"dataset": "builtin:books"})
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sedac_cli.artifacts.manifest import versions
from sedac_cli.gates.base import Gate, TokenState
from sedac_cli.gpu.reference import entropy_of_logits, row_chunks
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.plan import Plan
from sedac_cli.runtime.skip import skipping
from sedac_cli.runtime.text import TextStream

SCHEMA = 1
VALUES = ("risk", "score", "confidence", "entropy")
"""What rules remember of a token at a layer, the most telling first."""


class Recorder(Gate):
    """Decides as `inner` does, and remembers the scale of every layer and the value each decision was based on."""

    def __init__(self, inner: Gate):
        super().__init__(inner.num_layers, inner.guards)
        self.inner, self.name, self.looks_at = inner, inner.name, inner.looks_at
        self.trivial, self.floor = inner.trivial, inner.floor
        self.scales: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.kind: str | None = None

    @property
    def blends(self) -> bool:
        return self.inner.blends

    def reads(self, layer: int) -> bool:
        return self.inner.reads(layer)

    def start(self, *args: Any, **more: Any) -> TokenState:
        return self.inner.start(*args, **more)

    def decide(self, layer: int, hidden: Tensor | None, state: TokenState) -> None:
        self.inner.decide(layer, hidden, state)
        self.scales[layer] = state.scale.clone()
        if self.inner.reads(layer):
            self.kind = next((name for name in VALUES if name in state.memory), None)
            if self.kind is not None:
                self.values[layer] = state.memory[self.kind].clone()

    def parameters(self) -> dict[str, Any]:
        return self.inner.parameters()

    def to(self, device: torch.device | str) -> Recorder:
        self.inner = self.inner.to(device)
        return self


@torch.inference_mode()
def read_tokens(
    loaded: LoadedModel,
    plan: Plan,
    gate: str,
    ids: list[int],
    text: dict[str, Any],
    source: dict[str, str] | None = None,
) -> dict[str, Any]:
    """One dense and one gated pass over `ids`. `source`: digests of the files the gate came from."""
    decoder = loaded.decoder
    tokens = torch.tensor([ids], device=loaded.device)
    dense = _facts(loaded, decoder.last_hidden(tokens)[0], ids)
    recorder = Recorder(plan.gate)
    prefill = plan.gate.guards.prefill
    with skipping(loaded.model, recorder, plan.standin, decoder=decoder, keep_passes=True, prefill=prefill) as run:
        gated = _facts(loaded, decoder.last_hidden(tokens)[0], ids)
    done = run.passes[0]
    skipped, exits = done.skipped[0].tolist(), done.exit_layer[0].tolist()
    masks = _masks(recorder, len(ids))
    pieces = _pieces(loaded, ids)
    values = {layer: value.tolist() for layer, value in sorted(recorder.values.items())}
    rows = []
    for i, token in enumerate(ids):
        rows.append(
            {
                "text": pieces[i],
                "token": token,
                "skipped": skipped[i],
                "exit_layer": exits[i],
                "layers": masks[i],
                "entropy": round(gated["entropy"][i], 4),
                "entropy_dense": round(dense["entropy"][i], 4),
                "p": _rounded(gated["p"][i]),
                "p_dense": _rounded(dense["p"][i]),
                "agrees": gated["best"][i] == dense["best"][i],
                "values": {str(layer): round(column[i], 5) for layer, column in values.items()},
            }
        )
    return {
        "schema_version": SCHEMA,
        "model": loaded.identity.ref,
        "architecture": loaded.identity.architecture,
        "random_weights": _is_untrained(loaded, dense["p"]),
        "gate": gate,
        "gate_name": plan.gate.name,
        "parameters": plan.gate.parameters(),
        "value": recorder.kind,
        "num_layers": decoder.num_layers,
        "skip_ratio": sum(skipped) / max(1, len(ids) * decoder.num_layers),
        "text": text,
        "source": source or {},
        "versions": versions(),
        "tokens": rows,
    }


def _facts(loaded: LoadedModel, hidden: Tensor, ids: list[int]) -> dict[str, list[Any]]:
    """Per token: entropy (bits) and first choice of what follows it, and how probable it was itself."""
    entropy, best, nll = [], [], []
    target = torch.tensor([*ids[1:], 0], device=hidden.device)
    for rows in row_chunks(hidden.shape[0], loaded.decoder.vocab_size):
        logits = loaded.decoder.head(hidden[rows]).float()
        bits, _, first = entropy_of_logits(logits)
        entropy += bits.tolist()
        best += first.tolist()
        wanted = target[rows].to(logits.device)
        nll += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
    return {"entropy": entropy, "best": best, "p": [None, *(float(torch.tensor(-x).exp()) for x in nll[:-1])]}


def _masks(recorder: Recorder, count: int) -> list[str]:
    """Per token a 0 or 1 per layer: 1 where the MLP was skipped."""
    columns = []
    for layer in range(recorder.num_layers):
        scale = recorder.scales.get(layer)
        columns.append([0] * count if scale is None or recorder.trivial else (scale == 0).int().tolist())
    return ["".join(str(column[i]) for column in columns) for i in range(count)]


def _pieces(loaded: LoadedModel, ids: list[int]) -> list[str]:
    """Text by token; a character made of several tokens belongs to its last."""
    stream = TextStream(loaded.tokenizer)
    pieces = [stream.push(token) for token in ids]
    if pieces:
        pieces[-1] += stream.finish()
    return pieces


def _is_untrained(loaded: LoadedModel, p: list[float | None]) -> bool:
    """Half as bad as a coin over the vocabulary is no trained model."""
    known = [x for x in p if x]
    if not known:
        return False
    return float(-torch.tensor(known).log().mean()) > float(torch.tensor(loaded.decoder.vocab_size / 2.0).log())


def _rounded(p: float | None) -> float | None:
    return None if p is None else float(f"{p:.4g}")
