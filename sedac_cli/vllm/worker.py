"""What happens in a vLLM worker: once its model is loaded, the gate goes in; then the worker answers for it.

llm.collective_rpc("sedac_status")                             # one report per worker
llm.collective_rpc("sedac_set_thresholds", args=([0.4],))      # from the next step on
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from sedac_cli.errors import InputError, SedacError
from sedac_cli.vllm import handshake
from sedac_cli.vllm.metrics import Reporter
from sedac_cli.vllm.plan import ModelShape, build_plan
from sedac_cli.vllm.runner import attach
from sedac_cli.vllm.session import Session, carries_state
from sedac_cli.vllm.settings import Settings
from sedac_cli.vllm.surgery import find_layers

log = logging.getLogger("vllm.sedac")


def prepare(worker: Any, settings: Settings) -> None:
    """Called when a worker is made: its model comes later."""
    load = worker.load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        try:
            worker.sedac = gate_model(worker, settings)
        except SedacError as error:
            log.error("sedac: %s", error.message)
            raise
        return result

    worker.load_model = load_model
    worker.sedac = None
    worker.sedac_status = lambda: status(worker)
    worker.sedac_reset = lambda: session_of(worker).reset()
    worker.sedac_set_thresholds = lambda values: session_of(worker).set_thresholds([float(x) for x in values])
    worker.sedac_force = lambda off: session_of(worker).force([int(x) for x in off])


def gate_model(worker: Any, settings: Settings) -> Session:
    runner, config = worker.model_runner, worker.vllm_config
    shape = ModelShape.of(config.model_config)
    plan = build_plan(settings, shape)
    check_engine(config, plan.gate)
    layers = find_layers(runner.get_model(), shape.num_layers)
    device = torch.device(runner.device)
    kind = Session
    if device.type == "cuda":
        from sedac_cli.vllm.device import DeviceSession

        kind = DeviceSession
    elif device.type != "cpu":
        raise InputError(f"sedac gates models on CUDA and CPU, not on {device.type}")
    with torch.inference_mode(False), torch.no_grad():
        session = kind(settings, plan, layers, device, config.scheduler_config.max_num_batched_tokens)
        # Where vLLM makes the norm one launch with an all-reduce, it is left to that.
        if not getattr(config.compilation_config.pass_config, "fuse_allreduce_rms", False):
            session.join_norms()
        session.install()
    session.runner = attach(runner, session)
    log.info(
        "sedac %s: gate %s, %d of %d MLPs can be skipped (%s, %s runner), settings %s",
        settings.version, plan.gate.name, len(session.gated), shape.num_layers, session.kind, session.runner, settings.digest,
    )  # fmt: skip
    parallel = config.parallel_config
    rank = worker.rank + getattr(parallel, "data_parallel_rank", 0) * parallel.world_size
    tensor = worker.rank % parallel.tensor_parallel_size
    first_stage = worker.rank // parallel.tensor_parallel_size % parallel.pipeline_parallel_size == 0
    Reporter(session, rank, counts=tensor == 0, first_stage=first_stage).start()
    handshake.report("worker", status(session=session, rank=worker.rank))
    return session


def check_engine(config: Any, gate: Any) -> None:
    """Refuse by name what would make skipping wrong."""
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1 and carries_state(gate):
        raise InputError(
            f"gate '{gate.name}' carries its decision from layer to layer, and pipeline parallel stages do not pass it on",
            hint="tensor parallel works; of the gates, learned, always, random and forced work with pipeline parallel",
        )
    refused = {
        "dual batch overlap (--enable-dbo)": getattr(parallel, "enable_dbo", False),
        "prefill context parallel": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        f"runner '{config.model_config.runner_type}'": config.model_config.runner_type != "generate",
        "sequence parallel compilation (enable_sp)": getattr(config.compilation_config.pass_config, "enable_sp", False),
    }
    for what, on in refused.items():
        if on:
            raise InputError(f"sedac does not work with {what}")


def session_of(worker: Any) -> Session:
    if worker.sedac is None:
        raise InputError("this worker has no gated model")
    return worker.sedac


def status(worker: Any = None, session: Session | None = None, rank: int | None = None) -> dict[str, Any]:
    if session is None:
        session, rank = session_of(worker), worker.rank
    return session.status() | {"rank": rank, "runner": session.runner}
