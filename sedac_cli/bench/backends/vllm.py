"""The `vllm` backend: vLLM's own offline engine, the gate inside it by sedac's plugin. Dense is the same engine without.

Always true: engines of dense and of the configuration live side by side and share the GPU, so that runs can alternate; prefix
caching is off, for a prompt that was seen before would cost nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from sedac_cli.bench.backends import Cell, Session, offline_cells
from sedac_cli.bench.machine import Meter
from sedac_cli.bench.matrix import Experiment, Matrix
from sedac_cli.bench.metrics import Run
from sedac_cli.bench.quality import Scored, quality_from_logprobs
from sedac_cli.config import ModelSpec
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError, UsageError
from sedac_cli.models import resolve
from sedac_cli.vllm import installed

OWN_DRAFTS = {"ngram": "ngram"}
"""Modes whose drafts vLLM makes itself."""


def open_backend(matrix: Matrix, model: ModelSpec, seed: int) -> VLLM:
    if not installed():
        raise InputError("vLLM is not installed", hint="pip install 'sedac[vllm]', or --backend hf")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
    return VLLM(matrix, model, seed)


class VLLM:
    name = "vllm"
    baseline = "the same vLLM engine with the same arguments and no gate"
    one_at_a_time = True

    def __init__(self, matrix: Matrix, model: ModelSpec, seed: int):
        self.matrix, self.model, self.seed = matrix, model, seed
        self.path, _ = resolve(model.ref)
        self.tokenizer = _tokenizer(self.path, model)
        self._dense: Any = None
        self._own: tuple[str, Any] | None = None
        self._dense_scored: list[Scored] | None = None
        for experiment in matrix.experiments:
            engine_options(experiment)

    def describe(self) -> dict[str, Any]:
        import torch
        import vllm

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return {"model": self.model.ref, "engine": f"vLLM {vllm.__version__}", "device": device, "dtype": self._dtype()}

    def cells(self) -> list[Cell]:
        return offline_cells(self.matrix)

    def engines(self, experiment: Experiment) -> list[str]:
        return ["vllm"]

    def prompts_per_run(self, cell: Cell) -> int:
        return cell.batch

    @contextlib.contextmanager
    def open(self, experiment: Experiment, cell: Cell, engine: str) -> Iterator[Session]:
        yield VLLMSession(self._engine(experiment), experiment)

    def aside(self, cell: Cell, engine: str, prompts: list[str]) -> None:
        return None

    def quality(self, experiment: Experiment, corpus: Corpus | None, prompts: list[str]) -> dict[str, Any] | None:
        from vllm import SamplingParams

        if self.matrix.quality.tasks:
            raise InputError("lm-eval tasks are run by --backend hf", hint="--backend hf --tasks ...")
        wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        own = []
        for output in self._engine(experiment).generate(prompts, wanted, use_tqdm=False):
            rows = output.prompt_logprobs[1:]
            told = [row[token].logprob for token, row in zip(output.prompt_token_ids[1:], rows, strict=True)]
            own.append(Scored(told, [_most_likely(row) for row in rows]))
        if experiment.is_baseline:
            self._dense_scored = own
        return quality_from_logprobs(self._dense_scored, own, self.seed)

    def close(self) -> None:
        self._dense = self._own = None
        _free()

    def _dtype(self) -> str:
        return self.model.dtype

    def _engine(self, experiment: Experiment) -> Any:
        if experiment.is_baseline:
            self._dense = self._dense or self._start(experiment)
            return self._dense
        if self._own is None or self._own[0] != experiment.name:
            self._own = None  # its memory is needed for the next one
            _free()
            self._own = (experiment.name, self._start(experiment))
        return self._own[1]

    def _start(self, experiment: Experiment) -> Any:
        from vllm import LLM

        matrix = self.matrix
        longest = max(max(matrix.prompt_lengths), matrix.quality.max_length)
        engine = LLM(
            model=self.path, revision=self.model.revision, dtype=self._dtype(), seed=self.seed,
            trust_remote_code=self.model.trust_remote_code, gpu_memory_utilization=matrix.gpu_memory_utilization,
            max_model_len=longest + longest // 8 + 8 + matrix.new_tokens, max_num_seqs=max(matrix.batch),
            enable_prefix_caching=False, disable_log_stats=False, enforce_eager=matrix.engine == "eager",
            **engine_options(experiment),
        )  # fmt: skip
        if experiment.how.needs_gate:
            _status(engine)  # a plugin that was not loaded must not pass for a gate that changes nothing
        return engine


class VLLMSession:
    def __init__(self, llm: Any, experiment: Experiment):
        import torch

        self.llm, self.experiment = llm, experiment
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self, prompts: list[str], new_tokens: int) -> Run:
        from vllm import SamplingParams

        gated = self.experiment.how.needs_gate
        before, drafted = (_status(self.llm) if gated else None), _drafted(self.llm)
        wanted = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        with Meter(self.device) as meter:
            began = time.perf_counter()
            outputs = self.llm.generate(prompts, wanted, use_tqdm=False)
            seconds = time.perf_counter() - began
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        made = sum(map(len, tokens))
        first = [x for x in (getattr(o.metrics, "first_token_latency", None) for o in outputs) if x]
        prefill = max(first) if len(first) == len(outputs) else None
        decode = None if prefill is None or made == len(outputs) else seconds - prefill
        skipped, decided = (None, 0) if before is None else _difference(before, _status(self.llm))
        return Run(
            seconds=seconds,
            prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
            new_tokens=made,
            prefill_seconds=prefill,
            decode_seconds=decode,
            ttft=first,
            itl=[gap for output in outputs if (gap := _mean_gap(output)) is not None],
            sequences=len(outputs),
            skipped_per_layer=skipped,
            decided_tokens=decided,
            drafts=_drafts(drafted, _drafted(self.llm), made, len(outputs)) if self.experiment.how.draft else None,
            joules=meter.joules,  # peak memory is what vLLM was told to take: no measurement
            at_power_limit=meter.at_power_limit,
            tokens=tokens,
        )

    def close(self) -> None:
        pass


def engine_options(experiment: Experiment) -> dict[str, Any]:
    """What the gate and the drafts of an experiment are to vLLM."""
    how = experiment.how
    if how.loop and how.name not in OWN_DRAFTS:
        raise UsageError(
            f"'{experiment.name}': mode '{how.name}' is the eager engine's; vLLM makes its own drafts",
            hint="modes here: dense, gated, gated_adaptive, ngram",
        )
    options: dict[str, Any] = {}
    if how.name in OWN_DRAFTS:
        drafts = experiment.drafts.model_dump(exclude_none=True)
        options["speculative_config"] = drafts | {"method": OWN_DRAFTS[how.name]}
    if how.needs_gate:
        options["additional_config"] = {"sedac": gate_settings(experiment)}
    return options


def gate_settings(experiment: Experiment) -> dict[str, Any]:
    """The plugin's own options: they stand in `additional_config`, so that what is compiled knows them."""
    if experiment.gate is not None:
        return {"gate": experiment.gate}
    found = {
        "probe_layers": experiment.sedac_probe_layers
        or (None if experiment.sedac_layer is None else [experiment.sedac_layer]),
        "thresholds": experiment.sedac_thresholds
        or (None if experiment.sedac_threshold is None else [experiment.sedac_threshold]),
        "probe_dir": experiment.sedac_probe_dir,
        "probe_rank": experiment.sedac_probe_rank,
        "exit_rates": experiment.sedac_exit_rates,
        "calibration_steps": experiment.sedac_calibration_steps,
    }
    if experiment.sedac_probe_path is not None:
        raise UsageError(f"'{experiment.name}': vLLM takes a folder of probes", hint="sedac_probe_dir")
    adaptive = experiment.sedac_adaptive if experiment.sedac_adaptive is not None else experiment.how.adaptive
    return {"adaptive": adaptive} | {name: value for name, value in found.items() if value is not None}


def _tokenizer(path: str, model: ModelSpec) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def _status(llm: Any) -> dict[str, Any]:
    """Of the first worker: with tensor parallelism all decide alike."""
    try:
        return llm.collective_rpc("sedac_status")[0]
    except Exception as error:  # whatever a worker without the plugin answers
        raise InputError(
            f"no sign of the gate in vLLM's workers: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="sedac patch --status",
        ) from error


def _difference(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[int], int]:
    skipped = [b - a for a, b in zip(before["skipped"], after["skipped"], strict=True)]
    return skipped, after["tokens"] - before["tokens"]


def _most_likely(row: dict[int, Any]) -> int:
    """A row holds the text's own token and the most likely one; of equals the first, so that dense and gated choose alike."""
    return min(row, key=lambda token: (-row[token].logprob, token))


def _mean_gap(output: Any) -> float | None:
    """vLLM tells when a request's first and last token came, not those between."""
    m, count = output.metrics, len(output.outputs[0].token_ids)
    first, last = getattr(m, "first_token_ts", 0.0), getattr(m, "last_token_ts", 0.0)
    return (last - first) / (count - 1) if first and last and count > 1 else None


def _drafted(llm: Any) -> dict[str, int]:
    names = {"num_draft_tokens": "proposed", "num_accepted_tokens": "accepted"}
    found = dict.fromkeys(names.values(), 0)
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:spec_decode_")
        if name in names:
            found[names[name]] += int(metric.value)
    return found


def _drafts(before: dict[str, int], after: dict[str, int], made: int, sequences: int) -> dict[str, Any]:
    """vLLM counts only the steps that had drafts. All tokens after the first of each sequence come from steps, and every step
    of a sequence gives one token of the verifier's own besides the accepted ones."""
    counted = {name: after[name] - before[name] for name in after}
    tokens = made - sequences
    return counted | {
        "verify_steps": max(0, tokens - counted["accepted"]), "verify_tokens": tokens, "draft_skip_ratio": 0.0,
        "break_even_measured": None, "break_even_flops": None, "near_ties": 0, "identical": None, "sequences": sequences,
    }  # fmt: skip


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
