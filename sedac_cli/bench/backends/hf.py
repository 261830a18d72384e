"""The `hf` backend: Hugging Face's own `generate` (engine `eager`), or the CUDA-graph engine (`graph`).

Always true: dense and gated run in the same engine with the same settings; what the graph engine refuses runs eager under
`auto`, and so does the dense beside it (`bench.pairing`). Dense in `eager` is the stock model with nothing installed in it, not a
gate that happens to skip nothing.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from sedac_cli.artifacts.files import plain
from sedac_cli.bench.backends import Cell, Session, offline_cells
from sedac_cli.bench.engines import wanted_engine
from sedac_cli.bench.floor import StepReads, read_bandwidth
from sedac_cli.bench.machine import Meter
from sedac_cli.bench.matrix import DENSE, Experiment, Matrix
from sedac_cli.bench.metrics import Run, gaps
from sedac_cli.bench.plans import check_experiment, plan_of
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
from sedac_cli.runtime.graph.refusals import refuse_recomputing
from sedac_cli.runtime.plan import Plan
from sedac_cli.runtime.skip import skipping

log = logging.getLogger("sedac")

BASELINES = {
    "eager": "transformers generate(), the stock model with nothing installed in it",
    "graph": "the same CUDA-graph engine, gate never",
}

ASIDE_TOKENS, ASIDE_RUNS = 17, 3


def open_backend(matrix: Matrix, model: ModelSpec, seed: int) -> HuggingFace:
    for experiment in matrix.experiments:
        check_experiment(experiment)
    require_engine(matrix.engine, model.device)
    tasks = Tasks(matrix.quality, seed) if matrix.quality.tasks else None
    return HuggingFace(matrix, load_model(model), seed, tasks)


def why_no_graphs(device: torch.device) -> str | None:
    """What this machine lacks for the graph engine; None where it runs."""
    try:
        require_graphs(device)
    except InputError as error:
        return error.message
    return None


class HuggingFace:
    name = "hf"
    one_at_a_time = False

    def __init__(self, matrix: Matrix, loaded: LoadedModel, seed: int, tasks: Tasks | None = None):
        self.matrix, self.loaded, self.seed, self.tasks = matrix, loaded, seed, tasks
        self.tokenizer = loaded.tokenizer
        self.dense_ran_in: list[str] = []
        for experiment in matrix.experiments:
            self._check(experiment)
        self.no_graphs = why_no_graphs(loaded.device)
        automatic = loaded.device.type == "cuda" and any(wanted_engine(matrix, x) == "auto" for x in matrix.experiments)
        self.graph_refused = self.no_graphs if automatic else None  # nobody expects graphs of a CPU
        if self.graph_refused:
            log.warning("engine auto is eager here: %s", self.graph_refused)
        graphs = any("graph" in self.engines(x) for x in matrix.experiments)
        self.bandwidth = read_bandwidth(loaded.device) if graphs else None

    def engines(self, experiment: Experiment) -> list[str]:
        wanted = wanted_engine(self.matrix, experiment)
        if wanted != "auto":
            return [wanted]
        return ["eager"] if self.no_graphs else ["graph", "eager"]

    @property
    def baseline(self) -> str:
        if len(self.dense_ran_in) > 1:
            each = "; ".join(f"{engine}: {BASELINES[engine]}" for engine in self.dense_ran_in)
            return f"in the engine of the configuration beside it ({each})"
        return BASELINES[(self.dense_ran_in or self.engines(DENSE))[0]]

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
            "engine": ", ".join(self.dense_ran_in or self.engines(DENSE)[:1]),
            "graph_refused": self.graph_refused,
            "read_bytes_per_second": self.bandwidth,
        }

    def cells(self) -> list[Cell]:
        return offline_cells(self.matrix)

    def prompts_per_run(self, cell: Cell) -> int:
        return cell.batch

    @contextlib.contextmanager
    def open(self, experiment: Experiment, cell: Cell, engine: str) -> Iterator[Session]:
        plan = self._plan(experiment)
        session: Session
        if experiment.how.loop:
            from sedac_cli.bench.backends.drafting import DraftingSession

            session = DraftingSession(self.loaded, plan, experiment)
        elif engine == "graph":
            session = GraphSession(self.loaded, plan, cell, self.bandwidth)
        else:
            session = EagerSession(self.loaded, None if experiment.is_baseline else plan)
        if experiment.is_baseline and engine not in self.dense_ran_in:
            self.dense_ran_in.append(engine)
        try:
            yield session
        finally:
            session.close()
            if self.loaded.device.type == "cuda":
                torch.cuda.empty_cache()

    def aside(self, cell: Cell, engine: str, prompts: list[str]) -> dict[str, Any] | None:
        """Beside the graph engine on a GPU: Hugging Face's own `generate`, without a pair and after the pairs."""
        if engine != "graph" or not self.bandwidth or cell.new_tokens < 2:
            return None
        session, tokens = EagerSession(self.loaded, None), min(cell.new_tokens, ASIDE_TOKENS)
        runs = [session.run(prompts, tokens) for _ in range(1 + ASIDE_RUNS)][1:]
        samples = [run.decode_seconds / run.steps for run in runs if run.decode_seconds]
        return {"engine": "eager", "step_seconds": statistics.median(samples), "samples": samples}

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
            at_power_limit=meter.at_power_limit,
            tokens=out[:, width:].tolist(),
        )

    def close(self) -> None:
        pass


def greedy(new_tokens: int) -> GenerateOptions:
    return GenerateOptions(max_new_tokens=new_tokens, ignore_eos=True)


class GraphSession:
    """The CUDA-graph engine; one per batch size and length, as its graphs are. They are captured here, so that what cannot be
    captured is refused before anything was measured."""

    def __init__(self, loaded: LoadedModel, plan: Plan, cell: Cell, bandwidth: float | None):
        assert cell.prompt_length is not None
        # Text that is decoded and read again may come out a few tokens longer.
        room = cell.prompt_length + cell.prompt_length // 8 + 8 + cell.new_tokens
        self.loaded, self.bandwidth, self.reads = loaded, bandwidth, StepReads.of(loaded, plan)
        refuse_recomputing(loaded, cell.prompt_length, room)
        self.engine_object = GraphEngine(loaded, plan, batch=cell.batch, max_length=room)
        self.engine_object.prepare(greedy(cell.new_tokens), (), loaded.tokenizer.pad_token_id)

    def run(self, prompts: list[str], new_tokens: int) -> Run:
        times: list[float] = []
        options = greedy(new_tokens)

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
            lengths = encode_prompts(self.loaded, prompts, options)["attention_mask"].sum(dim=1).tolist()
            floor = self.reads.bytes_of(steps.ran, lengths) / self.bandwidth
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
            at_power_limit=meter.at_power_limit,
            tokens=[[token.token for token in row] for row in made.tokens],
        )

    def close(self) -> None:
        del self.engine_object
