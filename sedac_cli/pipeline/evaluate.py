"""Run a model dense and gated over the same text and keep, for every predicted token, what the skips changed.

Always true: quality is measured with the skips in force, by the runtime that really skips, on the same tokens. Text
stands for the phase the gate acts in: under a gate that leaves prompts alone, for generated tokens.

    evaluation = evaluate(loaded, gate, corpus, batch_size=8)
    evaluation.measures()["ppl_ratio"]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac_cli.corpus import Corpus, pad_batch
from sedac_cli.gates.base import Gate
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.gpu.choose import entropy_bits
from sedac_cli.gpu.reference import entropy_of_logits, kl_of_logits, row_chunks
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.simulate import Outcome, join, simulate
from sedac_cli.runtime.deep import Thought
from sedac_cli.runtime.skip import skipping
from sedac_cli.standins import StandIn

Array = np.ndarray[Any, Any]
MEASURES = ("ppl_dense", "ppl_gated", "ppl_ratio", "agreement", "kl", "skip_ratio")


@dataclass
class Evaluation:
    """Per predicted token: `sequence`, `target` id, `nll_*` and `kl` in nats, `entropy` in bits, `agree`,
    `skipped` MLPs. Per real token of the text: the simulated and the real decisions."""

    columns: dict[str, Array]
    num_layers: int
    real: Outcome
    simulated: Outcome | None
    context: float
    seconds_dense: float
    seconds_gated: float
    thought: int = 0
    """Tokens that deep thinking ran again; `real.again` counts every token of those passes."""

    @property
    def predicted(self) -> int:
        return len(self.columns["target"])

    def measures(self, rows: Array | None = None) -> dict[str, float]:
        """The figures over all predicted tokens, or some of them."""
        c = self.columns if rows is None else {k: v[rows] for k, v in self.columns.items()}
        if len(c["target"]) == 0:
            return dict.fromkeys(MEASURES, math.nan)
        dense, gated = float(c["nll_dense"].mean()), float(c["nll_gated"].mean())
        return {
            "ppl_dense": float(np.exp(dense)),  # of numpy: infinite where it overflows
            "ppl_gated": float(np.exp(gated)),
            "ppl_ratio": float(np.exp(gated - dense)),
            "agreement": float(c["agree"].mean()),
            "kl": float(c["kl"].mean()),
            "skip_ratio": float(c["skipped"].mean()) / self.num_layers,
        }

    def intervals(self, seed: int, draws: int = 1000, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals over sequences: tokens of one sequence are not independent, sequences are."""
        sums = self.per_sequence()
        rng = np.random.default_rng(seed)
        picks = rng.integers(0, len(sums["tokens"]), size=(draws, len(sums["tokens"])))
        total = {name: values[picks].sum(axis=1) for name, values in sums.items()}
        dense, gated = total["nll_dense"] / total["tokens"], total["nll_gated"] / total["tokens"]
        drawn = {
            "ppl_dense": np.exp(dense),
            "ppl_gated": np.exp(gated),
            "ppl_ratio": np.exp(gated - dense),
            "agreement": total["agree"] / total["tokens"],
            "kl": total["kl"] / total["tokens"],
            "skip_ratio": total["skipped"] / total["tokens"] / self.num_layers,
        }
        edges = [(1 - level) / 2, (1 + level) / 2]
        return {name: tuple(float(x) for x in np.quantile(drawn[name], edges)) for name in MEASURES}  # type: ignore[misc]

    def per_sequence(self) -> dict[str, Array]:
        """Sums over the predicted tokens of each sequence: the raw samples behind every figure."""
        _, inverse = np.unique(self.columns["sequence"], return_inverse=True)
        sums: dict[str, Array] = {"tokens": np.bincount(inverse).astype(np.float64)}
        for name in ("nll_dense", "nll_gated", "agree", "kl", "skipped"):
            sums[name] = np.bincount(inverse, weights=self.columns[name].astype(np.float64))
        return sums


@torch.inference_mode()
def evaluate(
    loaded: LoadedModel,
    gate: Gate,
    corpus: Corpus,
    batch_size: int,
    standin: StandIn | None = None,
    progress: Progress = quiet_progress,
    deep: DeepThinking | None = None,
) -> Evaluation:
    """Dense and gated passes over every batch. The gate also decides on the dense pass's states: the simulation.

    With `deep`, uncertain tokens are run again; what that costs is taken off what each token skipped.
    """
    decoder = loaded.decoder
    parts: list[dict[str, Tensor]] = []
    real, simulated = [], []
    seconds = {"dense": 0.0, "gated": 0.0}
    first = thought_again = 0
    reads = [layer for layer in range(decoder.num_layers) if gate.reads(layer)]
    watch = decoder.at_checkpoint if gate.looks_at == "entry" else decoder.at_mlp
    gate.to(decoder.device)
    with progress(total=corpus.spec.samples, desc="validate", unit="sample") as bar:
        for samples in corpus.batches(batch_size):
            ids, mask = (x.to(decoder.device) for x in pad_batch(samples, loaded.tokenizer.pad_token_id or 0))
            given = None if bool(mask.all()) else mask
            states: dict[int, Tensor] = {}
            with ExitStack() as hooks:
                for layer in reads:
                    hooks.callback(watch(layer, partial(_keep, states, ids.device, layer)).remove)
                dense, took = _timed(partial(decoder.last_hidden, ids, given))
                seconds["dense"] += took
            shape = (ids.shape[0], ids.shape[1])
            position = torch.arange(shape[1], device=ids.device).expand(shape).flatten()
            simulated.append(simulate(gate, states, shape=shape, position=position, real=mask.bool().flatten()))
            with skipping(
                loaded.model, gate, standin, decoder=decoder, keep_passes=True, prefill=gate.guards.prefill
            ) as run:
                work = partial(decoder.last_hidden, ids, given)
                if deep is not None:
                    thought = Thought(run, deep)
                    bits = partial(_final_entropy, loaded)
                    work = partial(thought.answer, work, bits, mask.bool(), lambda: None)
                gated, took = _timed(work)
                seconds["gated"] += took
            if deep is not None:
                thought_again += thought.tokens
            done, again = run.passes[-1], len(run.passes) - 1
            per_layer = torch.tensor(run.skipped_per_layer, device=ids.device)
            keep = done.real
            tokens = int(keep.sum())
            skipped = torch.stack([p.skipped for p in run.passes]).sum(dim=0) - again * decoder.num_layers
            real.append(Outcome(done.exit_layer[keep], skipped[keep], per_layer, tokens, again * tokens))
            predicts = keep[:, :-1] & keep[:, 1:]
            part = _compare(dense[:, :-1][predicts], gated[:, :-1][predicts], ids[:, 1:][predicts], loaded)
            part["skipped"] = skipped[:, :-1][predicts]
            part["exit_layer"] = done.exit_layer[:, :-1][predicts]
            number = torch.arange(first, first + len(samples), device=ids.device)
            part["sequence"] = number.unsqueeze(1).expand(predicts.shape)[predicts]
            parts.append({name: value.cpu() for name, value in part.items()})
            first += len(samples)
            bar.update(len(samples))
    columns = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    outcome = join(real)
    return Evaluation(
        columns, decoder.num_layers, outcome, join(simulated), outcome.tokens / first, seconds["dense"],
        seconds["gated"], thought_again,
    )  # fmt: skip


def _keep(states: dict[int, Tensor], device: torch.device, layer: int, hidden: Tensor) -> None:
    states[layer] = hidden.reshape(-1, hidden.shape[-1]).to(device)


def _final_entropy(loaded: LoadedModel, hidden: Tensor) -> Tensor:
    """[B, T, H] of the last layer -> bits, [B, T]."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return entropy_bits(rows, loaded.decoder.head, loaded.decoder.vocab_size).view(hidden.shape[:2])


def _timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.perf_counter()
    result = work()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result, time.perf_counter() - began


def _compare(dense: Tensor, gated: Tensor, target: Tensor, loaded: LoadedModel) -> dict[str, Tensor]:
    """Distributions of two sets of [N, H] rows, a chunk of logits at a time."""
    decoder = loaded.decoder
    rows: list[dict[str, Tensor]] = []
    for chunk in row_chunks(dense.shape[0], decoder.vocab_size):
        a, b, y = decoder.head(dense[chunk]).float(), decoder.head(gated[chunk]).float(), target[chunk]
        y = y.to(a.device)
        entropy, _, best = entropy_of_logits(a)
        rows.append(
            {
                "nll_dense": torch.nn.functional.cross_entropy(a, y, reduction="none"),
                "nll_gated": torch.nn.functional.cross_entropy(b, y, reduction="none"),
                "kl": kl_of_logits(a, b),
                "entropy": entropy,
                "agree": (best == b.argmax(dim=-1)).float(),
                "target": y,
            }
        )
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
