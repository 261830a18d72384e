"""SEDAC in a few lines of Python: an engine around `forward`, and a pipeline from prompt to text.

    engine = create_sedac_engine(model, exit_threshold=0.7, min_exit_layer=4, anchor_interval=4)
    result = engine.forward(input_ids, attention_mask=attention_mask)
    result.logits, result.skip_ratio, result.exit_layers

    pipeline = create_pipeline("builtin:tiny", gate="always:20")
    pipeline("The sea was", max_new_tokens=20).text

Always true: skipped MLPs are not computed, by the same runtime that every command uses; outside a call the model is exactly
as it was. Without `gate` the rule is the entropy gate of V9, whose mean and spread are measured first, on `text`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor

from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.corpus import Corpus
from sedac_cli.costs import model_costs
from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate, Guards
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.gates.registry import entropy_checks, entropy_gate
from sedac_cli.models import LoadedModel, adopt_model, cached_tokenizer, load_model
from sedac_cli.pipeline.lens import entropy_options, measure_entropy_gate
from sedac_cli.runtime.deep import Thought, thinking
from sedac_cli.runtime.engines import Generator, Used, require_engine
from sedac_cli.runtime.generate import GenerateOptions, TokenDecision
from sedac_cli.runtime.past import kept, renamed
from sedac_cli.runtime.plan import Plan, make_plan
from sedac_cli.runtime.skip import SkipRun, skipping
from sedac_cli.standins import StandIn, ZeroStandIn
from sedac_cli.structure import Decoder, find_decoder

log = logging.getLogger("sedac")

TEXT = TextSpec("builtin:books", split="calibration", samples=16, max_length=256)
"""What the entropy gate is measured on when no text is given."""
V9 = {
    "exit_threshold": 0.7, "min_exit_layer": 4, "anchor_interval": 4,
    "protect_first_n": 2, "protect_last_n": 1, "attention_sink_tokens": 4,
}  # fmt: skip


@dataclass(frozen=True)
class EngineOutput:
    """One forward pass. Every field can also be read by its name in brackets: `result["skip_ratio"]`."""

    logits: Tensor
    """[B, T, V]"""
    skip_ratio: float
    """Skipped (token, layer) MLPs / (tokens x all layers); what deep thinking runs again counts against it."""
    avg_exit_layer: float
    """Mean of `exit_layers` over the real tokens."""
    exit_layers: Tensor
    """[B, T]: the first layer whose MLP a token skipped; the number of layers where it skipped none, and for padding."""
    skipped: Tensor
    """[B, T]: how many MLPs each token skipped; 0 for padding."""
    compute_saved: float
    """Share of the whole model's FLOPs saved, the gate's own (its looks through the output head!) and the stand-ins' paid."""
    past_key_values: Any = None
    rounds: Tensor | None = None
    """[B, T], with deep thinking: how often each token was run again with all skips off."""

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def keys(self) -> list[str]:
        return [field.name for field in fields(self)]


class SedacEngine:
    """A model with a gate in force during its own calls. `model`, `gate`, `standin` and `tokenizer` (if any) may be used."""

    def __init__(
        self,
        decoder: Decoder,
        gate: Gate,
        standin: StandIn | None = None,
        *,
        tokenizer: Any = None,
        deep: DeepThinking | None = None,
        verbose: bool = False,
    ):
        self.decoder = decoder
        self.model = decoder.model
        self.gate = gate
        self.standin = standin or ZeroStandIn()
        self.tokenizer = tokenizer
        self.deep = deep
        self.verbose = verbose
        self._costs = cache(lambda context: model_costs(decoder, context))

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> EngineOutput:
        """One pass of the model with the gate in force; `inputs` (position_ids, a cache by either of its names ...) go to it."""
        place = self.decoder.device
        mask = None if attention_mask is None else attention_mask.to(place)
        inputs = renamed(self.model, inputs)
        with skipping(self.model, self.gate, self.standin, decoder=self.decoder, keep_passes=True) as run:
            if self.deep is None:
                thought = None
                output = self.model(input_ids=input_ids.to(place), attention_mask=mask, **inputs)
            else:
                with thinking(run, self.deep) as thought:
                    output = self.model(input_ids=input_ids.to(place), attention_mask=mask, **inputs)
        result = self._describe(output, run, thought)
        if self.verbose:
            log.info(
                "%s: %d tokens, %.1f%% of MLPs skipped, %.1f%% of the model's FLOPs saved net, exit layer %.1f of %d",
                self.gate.name, int(run.passes[0].real.sum()), 100 * result.skip_ratio, 100 * result.compute_saved,
                result.avg_exit_layer, self.decoder.num_layers,
            )  # fmt: skip
        return result

    __call__ = forward

    def _describe(self, output: Any, run: SkipRun, thought: Thought | None) -> EngineOutput:
        layers, last = self.decoder.num_layers, run.passes[-1]
        tokens = max(1, int(last.real.sum()))
        # Every pass does work, the first one included: n passes are n models' worth, less what was skipped in all of them.
        passes = len(run.passes)
        context = max(1, tokens // last.real.shape[0])
        saved = self._costs(context).saved(
            [skipped / tokens / passes for skipped in run.skipped_per_layer],
            self.gate.cost_per_token(self.decoder.hidden_size),
            [self.standin.cost_per_token(layer) for layer in range(layers)],
        )
        exits = torch.where(last.real, last.exit_layer, layers)
        return EngineOutput(
            logits=output.logits,
            skip_ratio=1 - passes + sum(run.skipped_per_layer) / (tokens * layers),
            avg_exit_layer=float(exits[last.real].double().mean()) if bool(last.real.any()) else float(layers),
            exit_layers=exits,
            skipped=last.skipped * last.real,
            compute_saved=1 - passes * (1 - saved),
            past_key_values=kept(output),
            rounds=None if thought is None else thought.rounds[0],
        )


@dataclass(frozen=True)
class PipelineOutput:
    """One prompt's answer. `text` goes on where the prompt ends."""

    text: str
    skip_ratio: float
    """Of the prompt's and the generated tokens' MLPs; what deep thinking runs again counts against it."""
    avg_exit_layer: float
    """Of the generated tokens; the number of layers for a token that skipped nothing."""
    tokens: list[TokenDecision]
    """Each generated token with what the pass that produced it skipped."""

    @property
    def generated_text(self) -> str:
        return self.text


class SedacPipeline:
    """Prompt in, text out. `engine` is the same model and gate for single passes."""

    def __init__(self, loaded: LoadedModel, engine: SedacEngine, runs: str = "auto"):
        """`runs`: what texts are generated by, `auto`, `eager` or `graph`. `used` tells what the last call ran in."""
        require_engine(runs, str(loaded.device), deep=engine.deep is not None)
        self.loaded = loaded
        self.engine = engine
        self.runs = runs
        self.used = Used("none")
        self._texts: Generator | None = None
        self._told: set[str] = set()

    def _generator(self) -> Generator:
        """Kept, with what it has captured, as long as gate and stand-in are the same."""
        engine, kept = self.engine, self._texts
        if not (
            kept and kept.plan.gate is engine.gate and kept.plan.standin is engine.standin and kept.deep is engine.deep
        ):
            self._texts = None
            self._texts = Generator(self.runs, self.loaded, Plan(engine.gate, engine.standin), engine.deep)
        assert self._texts is not None
        return self._texts

    @overload
    def __call__(self, prompt: str, **options: Any) -> PipelineOutput: ...

    @overload
    def __call__(self, prompt: Sequence[str], **options: Any) -> list[PipelineOutput]: ...

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> PipelineOutput | list[PipelineOutput]:
        """A prompt's output, or one output each for a list, which runs as one batch.

        Options: `max_new_tokens=128, temperature=0.0` (greedy)`, top_p=1.0, top_k=0, seed=0, chat=False, ignore_eos=False`.
        """
        known = [field.name for field in fields(GenerateOptions)]
        if unknown := sorted(set(options) - set(known)):
            raise UsageError(f"a pipeline has no option '{unknown[0]}'", hint="options: " + ", ".join(known))
        one = isinstance(prompt, str)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        done, self.used = self._generator()(prompts, GenerateOptions(**options))
        for note in self.used.notes:
            if note not in self._told:
                self._told.add(note)
                log.log(logging.WARNING if self.used.name == "eager" else logging.INFO, "%s", note)
        outputs = [
            PipelineOutput(text, ratio, sum(t.exit_layer for t in row) / len(row), row)
            for text, row, ratio in zip(done.texts, done.tokens, done.skip_ratios, strict=True)
        ]
        if self.engine.verbose:
            log.info("%d tokens, %.1f tokens/s, engine %s", done.new_tokens, done.tokens_per_second, self.used.name)
        return outputs[0] if one else outputs


def create_sedac_engine(
    model: Any,
    exit_threshold: float = 0.7,
    min_exit_layer: int = 4,
    anchor_interval: int = 4,
    protect_first_n: int = 2,
    protect_last_n: int = 1,
    attention_sink_tokens: int = 4,
    verbose: bool = False,
    *,
    gate: Gate | Plan | str | None = None,
    tokenizer: Any = None,
    mean: float | Sequence[float] | None = None,
    sd: float | Sequence[float] | None = None,
    text: str | TextSpec | Iterable[str] | None = None,
    deep: DeepThinking | None = None,
    seed: int = 0,
) -> SedacEngine:
    """An engine for `model`: `builtin:tiny`, a folder, a hub id, a `ModelSpec`, a `LoadedModel`, or a loaded HF model.

    Without `gate` the rule is V9's entropy gate and the first six options are its own: `exit_threshold` (lower skips
    more), the first layer that may be checked, every how many layers one runs for all tokens, how many layers at both ends and
    how many first positions of a sequence never skip. It needs `mean` and `sd` of the logit-lens entropy in bits (one
    number, or one per checked layer); those not given are measured once, on `text`: a string, a list of strings or a
    `TextSpec`; left out, 4,096 tokens of the built-in books. Give text like your own. Measuring needs a tokenizer: that of a
    model given by name; `tokenizer`; or the one saved where a loaded model came from.

    `gate`: any other rule: an object, or a spec (`sedac ls gates`) such as "learned:sedac_gates.pth@0.25", which brings its
    own guards; the six options are then refused. `deep`: uncertain tokens are run again, whole. `verbose` logs every pass.
    """
    given = {
        "exit_threshold": exit_threshold, "min_exit_layer": min_exit_layer, "anchor_interval": anchor_interval,
        "protect_first_n": protect_first_n, "protect_last_n": protect_last_n,
        "attention_sink_tokens": attention_sink_tokens,
    }  # fmt: skip
    if verbose:
        _show_log()
    found = _take(model, tokenizer)
    if isinstance(found, LoadedModel):
        decoder, tokenizer, identity = found.decoder, found.tokenizer, found.identity
    else:
        decoder, tokenizer, identity = found, None, None
    if gate is None:
        own = _v9_gate(decoder, tokenizer, given, mean, sd, text)
        return SedacEngine(decoder, own, tokenizer=tokenizer, deep=deep, verbose=verbose)
    foreign = [name for name, value in given.items() if value != V9[name]]
    foreign += [name for name, value in (("mean", mean), ("sd", sd), ("text", text)) if value is not None]
    if foreign:
        raise UsageError(f"{foreign[0]} belongs to the entropy gate, but another gate is named", hint="leave one out")
    if isinstance(gate, str):
        gate = make_plan(gate, decoder, identity, seed=seed)
    plan = gate if isinstance(gate, Plan) else Plan(gate, ZeroStandIn())
    return SedacEngine(decoder, plan.gate, plan.standin, tokenizer=tokenizer, deep=deep, verbose=verbose)


def create_pipeline(model: Any, *, tokenizer: Any = None, engine: str = "auto", **options: Any) -> SedacPipeline:
    """A pipeline for `model`; `options` are those of `create_sedac_engine`.

    `engine`: what texts are generated by. `graph`: CUDA graphs, `eager`: Hugging Face's own code, `auto`: graph where it can
    run. In a batch the graph engine runs an MLP if any of the sequences needs it."""
    if isinstance(model, ModelSpec | str):  # before it is loaded
        require_engine(engine, model.device if isinstance(model, ModelSpec) else "auto")
    loaded = _load(model, tokenizer)
    return SedacPipeline(loaded, create_sedac_engine(loaded, **options), engine)


def _load(model: Any, tokenizer: Any) -> LoadedModel:
    found = _take(model, tokenizer)
    if isinstance(found, LoadedModel):
        return found
    raise UsageError(f"no tokenizer beside this {type(model).__name__}", hint="tokenizer=...")


def _take(model: Any, tokenizer: Any) -> LoadedModel | Decoder:
    """Whatever the user calls a model; one in memory may come without a tokenizer, hence without an identity."""
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, (str, ModelSpec)):
        return load_model(model)
    tokenizer = tokenizer or cached_tokenizer(model)
    return find_decoder(model) if tokenizer is None else adopt_model(model, tokenizer)


def _v9_gate(decoder: Decoder, tokenizer: Any, given: dict[str, Any], mean: Any, sd: Any, text: Any) -> Gate:
    told = entropy_options("") | {
        "threshold": given["exit_threshold"],
        "min_exit_layer": given["min_exit_layer"],
        "anchor_interval": given["anchor_interval"],
        "mean": _numbers(mean),
        "sd": _numbers(sd),
    }
    guards = Guards(given["attention_sink_tokens"], given["protect_first_n"], given["protect_last_n"])
    if not entropy_checks(told, decoder, guards):
        log.warning("gate 'entropy' with these options checks no layer of %d: nothing is skipped", decoder.num_layers)
        return entropy_gate(told | {"mean": [0.0], "sd": [1.0]}, decoder, guards)
    if (mean is None or sd is None) and tokenizer is None:
        raise UsageError(
            "measuring mean and sd of the lens entropy takes a tokenizer, and none was found beside the model",
            hint="tokenizer=..., or mean=... and sd=...",
        )
    told, found = measure_entropy_gate(told, decoder, guards, _batches(text, tokenizer))
    if found is not None:
        where = "the built-in books" if text is None else "the given text"
        log.info(
            "lens entropy on %d tokens of %s: %s bits (mean +- sd by checked layer)", found.tokens, where,
            ", ".join(f"{layer}: {found.mean[layer]:.2f} +- {found.sd[layer]:.2f}" for layer in found.mean),
        )  # fmt: skip
    return entropy_gate(told, decoder, guards)


def _numbers(value: float | Sequence[float] | None) -> list[float] | None:
    return None if value is None else [float(x) for x in (value if isinstance(value, Sequence) else [value])]


def _batches(text: Any, tokenizer: Any) -> Iterable[list[list[int]]]:
    if text is None or isinstance(text, TextSpec):
        return Corpus(text or TEXT, tokenizer).batches(8)
    documents = [text] if isinstance(text, str) else list(text)
    ids = [tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in documents]
    length = TEXT.max_length
    pieces = [part[start : start + length] for part in ids for start in range(0, len(part), length)]
    return (pieces[first : first + 8] for first in range(0, len(pieces), 8))


def _show_log() -> None:
    """`verbose` is a wish to see something: where nobody has set logging up, the project's notes go to stderr."""
    if not log.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("sedac: %(message)s"))
        log.addHandler(handler)
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
