"""Deep thinking in the eager runtime: run gated, look at the final entropy, run uncertain tokens again with all skips off.

with skipping(model, gate) as run, thinking(run, DeepThinking(tau_high=4.5, max_rounds=2)) as thought:
    model.generate(**inputs)
thought.tokens, thought.passes      # tokens run again, forward passes that took
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.gpu.choose import entropy_bits
from sedac_cli.runtime.past import handing, past_in, past_length
from sedac_cli.runtime.positions import positions
from sedac_cli.runtime.skip import SkipRun, skipping
from sedac_cli.standins import StandIn
from sedac_cli.structure import Decoder


@dataclass
class Thought:
    """What was thought again, over all calls. Adaptive thresholds learn from first passes only: the others repeat."""

    run: SkipRun
    policy: DeepThinking
    calls: list[int] = field(default_factory=list)
    """Forward passes of each call, the first one included."""
    rounds: list[Tensor] = field(default_factory=list)
    """[B, T] of each call: how often each token was run again with all skips off."""
    entropy: Tensor | None = None
    """[B, T], bits, of the last call's answer."""

    @property
    def passes(self) -> int:
        """Forward passes beyond one per call."""
        return sum(self.calls) - len(self.calls)

    @property
    def tokens(self) -> int:
        """Tokens that were run again at least once."""
        return sum(int((rounds > 0).sum()) for rounds in self.rounds)

    def answer(
        self, call: Callable[[], Any], entropy_of: Callable[[Any], Tensor], real: Tensor, rewind: Callable[[], None]
    ) -> Any:
        """What `call` returns once no real token is uncertain, or once the rounds are used up.

        `entropy_of` gives the final entropies [B, T] of an answer; `rewind` undoes what a call left behind.
        """
        result = call()
        entropy = entropy_of(result)
        force = torch.zeros_like(real)
        rounds = torch.zeros_like(real, dtype=torch.long)
        passes = 1
        try:
            with not_learning(self.run.gate):
                for round in range(1, self.policy.max_rounds + 1):
                    wanted = self.policy.rerun(entropy, real, force, round)
                    if torch.equal(wanted, force):
                        break
                    force = wanted
                    rewind()
                    self.run.force = force
                    result = call()
                    entropy = entropy_of(result)
                    rounds += force
                    passes += 1
        finally:
            self.run.force = None
        self.calls.append(passes)
        self.rounds.append(rounds)
        self.entropy = entropy
        return result


@contextlib.contextmanager
def thinking(run: SkipRun, policy: DeepThinking) -> Iterator[Thought]:
    """In this context every call of the run's model, those of `generate` included, thinks again where it is unsure.

    A call that goes on from a cache takes its own entries back before the next round writes them. Where the model is
    asked for the last logits alone (`generate`), the other tokens of that pass have no answer to be unsure of.
    """
    model = run.decoder.model
    original, own = model.forward, model.__dict__.get("forward")
    signature = inspect.signature(original)
    thought = Thought(run, policy)

    @functools.wraps(original)  # `generate` reads the signature to learn what the model takes
    def forward(*args: Any, **kwargs: Any) -> Any:
        called = signature.bind_partial(*args, **kwargs).arguments
        called |= called.pop("kwargs", {})
        ids, cache = called.get("input_ids"), past_in(called)
        shape = tuple((called["inputs_embeds"] if ids is None else ids).shape[:2])
        if cache is not None and not hasattr(cache, "crop"):
            raise UsageError(
                f"deep thinking needs a cache it can take entries back from; {type(cache).__name__} cannot"
            )
        place = run.decoder.device
        _, real = positions(
            shape, called.get("attention_mask"), called.get("position_ids"), past_length(cache), place
        )  # fmt: skip

        def entropy_of(output: Any) -> Tensor:
            return logit_entropy(output.logits, shape).to(place)

        def rewind() -> None:
            if cache is not None:
                cache.crop(-shape[1])

        return thought.answer(lambda: original(*args, **kwargs), entropy_of, real.view(shape), rewind)

    model.forward = forward
    try:
        yield thought
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


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

    `cache`: past key values to go on from (a decode step).
    """
    with skipping(decoder.model, gate, standin, decoder=decoder) as run, thinking(run, policy) as thought:
        logits = decoder.model(
            input_ids=input_ids.to(decoder.device),
            attention_mask=attention_mask,
            use_cache=cache is not None,
            **handing(decoder.model, cache),
            **inputs,
        ).logits
    assert thought.entropy is not None
    return DeepResult(logits, thought.entropy, thought.rounds[0], thought.calls[0], run, cache)


def logit_entropy(logits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B, K, V] logits of the last K positions -> their entropies in bits, [B, T]; 0 where there are no logits."""
    rows = logits.reshape(-1, logits.shape[-1])
    known = entropy_bits(rows, lambda part: part, rows.shape[-1]).view(logits.shape[:2])
    entropy = torch.zeros(shape, device=known.device)
    entropy[:, -known.shape[1] :] = known
    return entropy


def not_learning(gate: Gate) -> contextlib.AbstractContextManager[None]:
    adaptive = getattr(gate, "adaptive", None)
    return contextlib.nullcontext() if adaptive is None else adaptive.paused()
