"""Deep thinking in the eager runtime: run gated, look at the final entropy, run uncertain tokens again with all skips off.

result = deep_forward(model, gate, input_ids, policy=DeepThinking(tau_high=4.5, max_rounds=2))
result.rounds        # [B, T]: how often each token was run again
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.gpu.reference import linear_entropy
from sedac_cli.runtime.skip import SkipRun, skipping
from sedac_cli.standins import StandIn
from sedac_cli.structure import Decoder


@dataclass(frozen=True)
class DeepResult:
    """The last round's answer. `run` counts the work of all rounds: a token that ran twice is two tokens there."""

    logits: Tensor
    """[B, T, V]"""
    entropy: Tensor
    """[B, T], bits, of `logits`."""
    rounds: Tensor
    """[B, T]: how often each token was run again with all skips off."""
    passes: int
    """Forward passes made, the first one included."""
    run: SkipRun
    cache: Any = None


@torch.no_grad()
def deep_forward(
    decoder: Decoder,
    gate: Gate,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    policy: DeepThinking,
    standin: StandIn | None = None,
    cache: Any = None,
    **inputs: Any,
) -> DeepResult:
    """One forward pass under `gate`, and up to `policy.max_rounds` more in which uncertain tokens skip nothing.

    `cache`: past key values to go on from (a decode step); each round takes its own entries back before the next one
    writes them. Adaptive thresholds learn from the first pass only: the others repeat its tokens.
    """
    if cache is not None and not hasattr(cache, "crop"):
        raise UsageError(f"deep thinking needs a cache it can take entries back from; {type(cache).__name__} cannot")
    ids = input_ids.to(decoder.device)
    real = _real(attention_mask, ids)
    with skipping(decoder.model, gate, standin, decoder=decoder) as run:

        def forward() -> Any:
            return decoder.model(
                input_ids=ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=cache is not None,
                **inputs,
            )

        logits = forward().logits
        entropy = _entropy(logits)
        force = torch.zeros_like(real)
        rounds = torch.zeros_like(ids)
        passes = 1
        with _not_learning(gate):
            for round in range(1, policy.max_rounds + 1):
                wanted = policy.rerun(entropy, real, force, round)
                if torch.equal(wanted, force):
                    break
                force = wanted
                if cache is not None:
                    cache.crop(-ids.shape[1])
                run.force = force
                logits = forward().logits
                entropy = _entropy(logits)
                rounds += force
                passes += 1
    return DeepResult(logits, entropy, rounds, passes, run, cache)


def _entropy(logits: Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    return linear_entropy(rows, lambda part: part, rows.shape[-1]).view(logits.shape[:2])


def _real(mask: Tensor | None, ids: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask.to(ids.device)[:, -ids.shape[1] :].bool()


def _not_learning(gate: Gate) -> contextlib.AbstractContextManager[None]:
    adaptive = getattr(gate, "adaptive", None)
    return contextlib.nullcontext() if adaptive is None else adaptive.paused()
