"""The `hf` backend: Hugging Face's own `generate` (engine `eager`), or the CUDA-graph engine (`graph`).

Always true: dense and gated run in the same engine with the same settings. Dense in `eager` is the stock model with
nothing installed in it, not a gate that happens to skip nothing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch

from sedac_cli.artifacts.files import plain
from sedac_cli.bench.backends import Cell, Session, offline_cells
from sedac_cli.bench.floor import StepReads, read_bandwidth
from sedac_cli.bench.machine import Meter
from sedac_cli.bench.matrix import Experiment, Matrix
from sedac_cli.bench.metrics import Run, gaps
from sedac_cli.bench.plans import plan_of
from sedac_cli.bench.quality import evaluate_quality
from sedac_cli.bench.tasks import Tasks
from sedac_cli.config import ModelSpec
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel, load_model
from sedac_cli.runtime.engines import require_engine
from sedac_cli.runtime.generate import GenerateOptions, check_room, encode_prompts
from sedac_cli.runtime.graph import GraphEngine
from sedac_cli.runtime.graph.capture import require_graphs
from sedac_cli.runtime.plan import Plan
from sedac_cli.runtime.skip import skipping

log = logging.getLogger("sedac")

BASELINES = {
    "eager": "transformers generate(), the stock model with nothing installed in it",
    "graph": "the same CUDA-graph engine, gate never",
}


def open_backend(matrix: Matrix, model: ModelSpec, seed: int) -> HuggingFace:
    tasks = Tasks(matrix.quality, seed) if matrix.quality.tasks else None
    require_engine(matrix.engine, model.device)
    loaded = load_model(model)
    return HuggingFace(matrix, loaded, pick_engine(matrix.engine, loaded.device), seed, tasks)


def pick_engine(wanted: str, device: torch.device) -> str:
    """`auto` takes the graph engine where it can run; asked for by name it runs or is refused."""
    if wanted == "eager" or (wanted == "auto" and device.type != "cuda"):
        return "eager"
    try:
        require_graphs(device)
    except InputError as error:
        if wanted == "graph":
            raise
        log.warning("engine auto is eager here: %s", error.message)
        return "eager"
    return "graph"


class HuggingFace:
    name = "hf"
    one_at_a_time = False

    def __init__(self, matrix: Matrix, loaded: LoadedModel, engine: str, seed: int, tasks: Tasks | None = None):
        self.matrix, self.loaded, self.engine, self.seed, self.tasks = matrix, loaded, engine, seed, tasks
        self.tokenizer = loaded.tokenizer
        self.baseline = BASELINES[engine]
        for experiment in matrix.experiments:
            self._check(experiment)
        graphs = "graph" in (engine, *(experiment.engine for experiment in matrix.experiments))
        self.bandwidth = read_bandwidth(loaded.device) if graphs else None

    def _check(self, experiment: Experiment) -> None:
        """What is misspelt is refused before an hour of measuring; a file that is not there is that configuration's crash."""
        with contextlib.suppress(InputError):
            self._plan(experiment)

    def _plan(self, experiment: Experiment) -> Plan:
        return plan_of(experiment, self.loaded.decoder, self.loaded.identity, self.seed)

    def describe(self) -> dict[str, Any]:
        return {
            "model": plain(self.loaded.identity),
            "layers": self.loaded.decoder.num_layers,
            "device": str(self.loaded.device),
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "engine": self.engine,
            "read_bytes_per_second": self.bandwidth,
        }

    def cells(self) -> list[Cell]:
        return offline_cells(self.matrix)

    def prompts_per_run(self, cell: Cell) -> int:
        return cell.batch

    @contextlib.contextmanager
    def open(self, experiment: Experiment, cell: Cell) -> Iterator[Session]:
        engine = self.engine if experiment.engine is None else pick_engine(experiment.engine, self.loaded.device)
        plan = self._plan(experiment)
        session: Session
        if experiment.how.loop:
            if engine == "graph" and experiment.engine == "graph":
                raise InputError(
                    "lossless drafts run in the eager engine", hint='"engine": "eager" for this experiment'
                )
            from sedac_cli.bench.backends.drafting import DraftingSession

            session = DraftingSession(self.loaded, plan, experiment)
        elif engine == "graph":
            session = GraphSession(self.loaded, plan, cell, self.bandwidth)
        else:
            session = EagerSession(self.loaded, None if experiment.is_baseline else plan)
        try:
            yield session
        finally:
            session.close()
            if self.loaded.device.type == "cuda":
                torch.cuda.empty_cache()

    def quality(self, experiment: Experiment, corpus: Corpus | None, prompts: list[str]) -> dict[str, Any] | None:
        plan = self._plan(experiment)
        return evaluate_quality(self.loaded, plan, corpus, self.matrix.quality, self.seed, self.tasks)

    def close(self) -> None:
        pass


class Stamps:
    """A streamer that only looks at the clock: `generate` hands over the prompt, then each step's tokens on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, value: object) -> None:
        if self.prompt_seen:
            self.times.append(time.perf_counter())
        self.prompt_seen = True

    def end(self) -> None:
        pass


class EagerSession:
    """`plan` None: dense, the stock model."""

    engine = "eager"

    def __init__(self, loaded: LoadedModel, plan: Plan | None):
        self.loaded, self.plan = loaded, plan

    @torch.inference_mode()
    def run(self, prompts: list[str], new_tokens: int) -> Run:
        loaded = self.loaded
        inputs = encode_prompts(loaded, prompts, GenerateOptions())
        width = inputs["input_ids"].shape[1]
        check_room(loaded, width, new_tokens)
        stamps = Stamps()
        with contextlib.ExitStack() as stack:
            gated = None
            if self.plan is not None:
                gated = stack.enter_context(
                    skipping(loaded.model, self.plan.gate, self.plan.standin, decoder=loaded.decoder)
                )
            meter = stack.enter_context(Meter(loaded.device))
            began = time.perf_counter()
            out = loaded.model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, use_cache=True,
                pad_token_id=loaded.tokenizer.pad_token_id, streamer=stamps,
            )  # fmt: skip
            ended = time.perf_counter()
        first = stamps.times[0]
        return Run(
            seconds=ended - began,
            prompt_tokens=int(inputs["attention_mask"].sum()),
            new_tokens=out[:, width:].numel(),
            prefill_seconds=first - began,
            decode_seconds=stamps.times[-1] - first,
            ttft=[first - began],
            itl=gaps(stamps.times),
            sequences=len(prompts),
            skipped_per_layer=gated.skipped_per_layer if gated else None,
            decided_tokens=gated.tokens if gated else 0,
            peak_bytes=meter.peak_bytes,
            joules=meter.joules,
            tokens=out[:, width:].tolist(),
        )

    def close(self) -> None:
        pass


class GraphSession:
    """The CUDA-graph engine; one per batch size and length, as its graphs are."""

    engine = "graph"

    def __init__(self, loaded: LoadedModel, plan: Plan, cell: Cell, bandwidth: float | None):
        assert cell.prompt_length is not None
        # Text that is decoded and read again may come out a few tokens longer.
        room = cell.prompt_length + cell.prompt_length // 8 + 8 + cell.new_tokens
        self.loaded, self.bandwidth, self.reads = loaded, bandwidth, StepReads.of(loaded, plan)
        self.engine_object = GraphEngine(loaded, plan, batch=cell.batch, max_length=room)

    def run(self, prompts: list[str], new_tokens: int) -> Run:
        times: list[float] = []
        options = GenerateOptions(max_new_tokens=new_tokens, ignore_eos=True)

        def seen(tokens: torch.Tensor) -> None:
            """Several steps come at once; each took its share of the time since the last that came."""
            now, before, steps = time.perf_counter(), times[-1] if times else 0.0, tokens.shape[0]
            times.extend(before + (now - before) * (i + 1) / steps for i in range(steps)) if times else times.append(
                now
            )

        with Meter(self.loaded.device) as meter:
            began = time.perf_counter()
            made = self.engine_object.generate(prompts, options, on_tokens=seen)
            ended = time.perf_counter()
        steps = self.engine_object.last
        assert steps is not None
        floor = None
        if self.bandwidth:
            floor = self.reads.bytes_of(steps.ran, made.prompt_tokens, len(prompts)) / self.bandwidth
        return Run(
            seconds=ended - began,
            prompt_tokens=made.prompt_tokens,
            new_tokens=made.new_tokens,
            prefill_seconds=made.prefill_seconds,
            decode_seconds=made.decode_seconds,
            ttft=[made.prefill_seconds],
            itl=gaps(times),
            sequences=len(prompts),
            skip_ratio=made.skip_ratio,
            skipped_per_layer=((~steps.ran).sum(dim=0) * len(prompts)).tolist(),
            decided_tokens=steps.steps * len(prompts),
            floor_seconds=floor,
            peak_bytes=meter.peak_bytes,
            joules=meter.joules,
            tokens=[[token.token for token in row] for row in made.tokens],
        )

    def close(self) -> None:
        del self.engine_object
