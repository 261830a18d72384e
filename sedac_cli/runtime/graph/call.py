"""A call of the graph engine: what it has made, and who hears of it on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from sedac_cli.runtime.graph.state import Burst
from sedac_cli.runtime.skip import Pass


@dataclass
class Run:
    """What a call of `run` made. tokens [steps, rows]; ran [steps, layers]: whether the MLP ran in that step; the first
    token is the prompt pass's, and has no step."""

    first: Tensor
    tokens: Tensor
    ran: Tensor
    entropy: Tensor
    prompt: Pass | None
    prefill_seconds: float
    decode_seconds: float
    replays: int
    steps: int = field(default=0)


class Listener(Protocol):
    """Hears a call of `run` as it goes; either may answer True to stop."""

    def prompt(self, seen: Pass | None, token: Tensor, entropy: Tensor, logprob: Tensor) -> bool: ...

    def burst(self, burst: Burst, ran: Tensor) -> bool: ...
