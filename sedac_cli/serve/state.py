"""What one server serves: the model, its gate, the engine that runs it, and the name clients call it by."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

from sedac_cli.models import LoadedModel
from sedac_cli.runtime.plan import Plan
from sedac_cli.runtime.stream import stream
from sedac_cli.serve.engine import Backend, Engine
from sedac_cli.serve.errors import ApiError
from sedac_cli.serve.limits import Limits
from sedac_cli.serve.metrics import Metrics
from sedac_cli.serve.prompts import Prompts


@dataclass
class Served:
    name: str
    ref: str
    gate: str
    engine: Engine
    prompts: Prompts
    metrics: Metrics
    limits: Limits
    top_logprobs: bool = True
    """Whether the engine knows the probabilities of tokens it did not choose."""
    started: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in (self.name, self.ref):
            raise ApiError(
                404, f"there is no model '{name}' here: this server has '{self.name}'", param="model",
                code="model_not_found",
            )  # fmt: skip


def make_served(
    loaded: LoadedModel, plan: Plan, gate: str, limits: Limits, name: str | None = None, backend: Backend | None = None,
    context: int | None = None, top_logprobs: bool = True,
) -> Served:  # fmt: skip
    """`backend` is any engine with the contract of `runtime.stream.stream`; unless given, the eager one. `context`: positions
    it has, where these are fewer than the model's."""
    name = name or loaded.identity.ref
    metrics = Metrics(loaded.decoder.num_layers, gate, name)
    backend = backend or partial(stream, loaded, plan)
    engine = Engine(backend, loaded.tokenizer, limits, metrics)
    return Served(
        name, loaded.identity.ref, gate, engine, Prompts(loaded, limits, context), metrics, limits, top_logprobs
    )
