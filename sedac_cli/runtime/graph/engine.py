"""The graph engine: the prompt in one pass, then decode steps as CUDA graphs, gates decided on the device, tokens fed back there.

One graph holds `burst` steps, so the host calls once for several tokens and never waits within a step: results of one burst
are read while the next one runs. A model of standard layers runs through the decode kernels once its logits have been
measured to be the model's own; any other through its own code, and `notes` says why.

    engine = GraphEngine(loaded, plan, batch=1, max_length=2048)
    result = engine.generate(["The sea was"], GenerateOptions(max_new_tokens=64))
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import InputError, SedacError, ran_out
from sedac_cli.gpu.skinny import MAX_SKINNY_ROWS
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.generate import Generated, GenerateOptions, check_room, encode_prompts, end_tokens
from sedac_cli.runtime.graph.agreement import LONG, SHORT, Gap, own_step
from sedac_cli.runtime.graph.call import Listener, Run
from sedac_cli.runtime.graph.capture import EAGER, captured, memory_said, on_its_device, require_graphs, require_served
from sedac_cli.runtime.graph.describe import describe
from sedac_cli.runtime.graph.fused import FusedStep, TooManyRowsError
from sedac_cli.runtime.graph.generic import GenericStep, refuse
from sedac_cli.runtime.graph.ops import KernelOps, Ops, TwinOps
from sedac_cli.runtime.graph.programs import ForcedProgram, Program, make_program
from sedac_cli.runtime.graph.refusals import refuse_recomputing, refuse_settings
from sedac_cli.runtime.graph.rotation import check_rotation, last_place
from sedac_cli.runtime.graph.sampling import Chooser, Settings, chooser_key, make_chooser
from sedac_cli.runtime.graph.standard import NotStandardError, check_kernels, standard_model
from sedac_cli.runtime.graph.state import Burst, KVCache, State, cache_layers
from sedac_cli.runtime.past import handing
from sedac_cli.runtime.plan import Plan
from sedac_cli.runtime.skip import Pass, skipping
from sedac_cli.runtime.warp import repetition_penalty
from sedac_cli.standins import ZeroStandIn

log = logging.getLogger("sedac")

BURST = 8


class GraphEngine:
    """For one batch size, one cache length and one gate. `capture=False` runs the same steps one by one, on any device."""

    def __init__(
        self,
        loaded: LoadedModel,
        plan: Plan,
        *,
        batch: int = 1,
        max_length: int = 2048,
        burst: int = BURST,
        capture: bool = True,
        forced: bool = False,
        fused: bool | None = None,
        own_sampling: bool = True,
    ):
        """`forced`: flags are the caller's (`engine.program.needs`), whatever the gate. `fused`: None finds out. `own_sampling`: the
        settings of sampling that come with the model count, as in `generate`; a stream knows its request's alone."""
        if capture:
            require_graphs(loaded.device)
        require_served(loaded, plan)
        if batch < 1 or max_length < 2:
            raise InputError(f"a graph engine for {batch} sequences of {max_length} tokens")
        self.loaded, self.plan, self.batch, self.burst, self.capture = loaded, plan, batch, burst, capture
        self.max_length, self.forced, self.own_sampling = max_length, forced, own_sampling
        self.device = loaded.device
        self.notes: list[str] = []
        self.state = State.empty(batch, self.device)
        layers = loaded.decoder.num_layers
        with memory_said(f"for a cache of {batch} x {max_length} tokens"):
            self.cache = KVCache(loaded, batch, max_length + burst)
            self.last_place = last_place(loaded.decoder, max_length)
            self.program: Program = (
                ForcedProgram(layers, batch, self.device) if forced else make_program(plan.gate, batch, self.device)
            )
            self.step = self._make_step(fused)
        self.settings = Settings.on(self.device)
        self.graphs: dict[tuple[Any, int], tuple[Any, Burst]] = {}
        self.stops: dict[tuple[int, ...], Tensor] = {}
        """End tokens on the device. Replays read them: they must live as long as the graphs."""
        self.last: Run | None = None
        """What the last call made, layer by layer."""

    # Steps ------------------------------------------------------------------------------------------------------------

    def _make_step(self, fused: bool | None) -> FusedStep | GenericStep:
        reason, name, crowded = "asked for", type(self.loaded.model).__name__, False
        if fused is not False:
            try:
                self.path = "fused"
                return self._fused_step()
            except NotStandardError as error:
                reason, crowded = str(error), isinstance(error, TooManyRowsError)
                if fused:
                    raise InputError(f"{name} cannot run fused: {reason}") from None
        self.path = "generic"
        self.notes.append(f"steps run through the model's own code: {reason}")
        try:
            return self._generic_step(name)
        except InputError as error:
            if not crowded:
                raise
            raise InputError(
                f"{reason}, and {error.message}",
                hint=f"{EAGER}, or at most {MAX_SKINNY_ROWS} sequences at once (--batch)",
            ) from error

    def _fused_step(self) -> FusedStep:
        loaded = self.loaded
        standard = standard_model(loaded.decoder)
        if self.device.type == "cuda":
            check_kernels(standard, loaded.decoder)
        check_rotation(loaded.decoder, standard.rotary, self.last_place)
        gap = self._gap(lambda program: FusedStep(loaded.decoder, standard, ZeroStandIn(), self.cache, program))
        if not gap.fits:
            raise NotStandardError(
                f"its layers look standard, but the kernels' logits are off by {gap.apart:.2g} of their norm"
            )
        return FusedStep(loaded.decoder, standard, self.plan.standin, self.cache, self.program)

    def _generic_step(self, name: str) -> GenericStep:
        loaded = self.loaded
        refuse(loaded, self.max_length)
        try:
            gap = self._gap(lambda program: GenericStep(loaded, ZeroStandIn(), self.cache, program))
        except SedacError:
            raise
        except Exception as error:
            if ran_out(error):
                raise
            log.debug("a step of %s failed", name, exc_info=True)
            raise InputError(
                f"{name} cannot take one token over a cache of fixed size: its code is not written for it "
                f"({type(error).__name__})",
                hint=EAGER,
            ) from error
        if not gap.fits:
            raise InputError(
                f"{name} over a cache of fixed size is off by {gap.apart:.2g} of its logits' norm: it counts or masks positions in "
                "a way of its own",
                hint=EAGER,
            )
        return GenericStep(loaded, self.plan.standin, self.cache, self.program)

    def _gap(self, make: Callable[[Program], Callable[[State], Tensor]]) -> Gap:
        """How far a step's logits are from the model's own forward pass, at both ends of the cache."""
        step = make(Program(self.loaded.decoder.num_layers, self.batch, self.device))
        last = self.last_place
        long = min(LONG, last + 1 if last else self.max_length)
        begin = last + 1 - long if last and takes(self.loaded.model, "position_ids") else 0
        return Gap.worst(self._gap_after(step, min(SHORT, long), 0), self._gap_after(step, long, begin))

    @torch.inference_mode()
    def _gap_after(self, step: Callable[[State], Tensor], length: int, begin: int) -> Gap:
        """After so many random tokens, the first of which stands at position `begin`."""
        loaded = self.loaded
        ids = torch.randint(0, loaded.decoder.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(
            self.device
        )
        mask = torch.ones_like(ids)
        whole = self._arguments(ids, mask, begin)
        own = loaded.model(**whole, use_cache=False).logits[0, -1]
        _, prompt, _ = self._prompt(ids[:, :-1], mask[:, :-1], gated=False, begin=begin)
        self._load(ids[:, :-1], mask[:, :-1], prompt, ids[:, -1])
        self.state.position[0] += begin
        found = step(self.state)[0]
        newest = {n: x[:, -1:] for n, x in whole.items() if isinstance(x, Tensor) and n != "attention_mask"}
        again = own_step(loaded.model, self._arguments(ids[:, :-1], mask[:, :-1], begin), whole | newest)
        return Gap.of(found, own, again, loaded.model.dtype)

    @torch.inference_mode()
    def _one_step(self, choose: Chooser, ends: Tensor, pad: int, into: Burst, index: int) -> None:
        choice = choose(self.step(self.state), self.ops)
        self.ops.step_end(choice, self.state, ends, pad, self.program.needs, into.at(index))

    @property
    def ops(self) -> Ops:
        if isinstance(self.step, FusedStep):
            return self.step.ops
        return KernelOps() if self.device.type == "cuda" else TwinOps()

    def _stop(self, ends: tuple[int, ...]) -> Tensor:
        if ends not in self.stops:
            self.stops[ends] = torch.tensor(ends, dtype=torch.long, device=self.device)
        return self.stops[ends]

    def _penalised(self) -> bool:
        """Whether the model's generation settings hold a penalty of repetitions; there is then room for what it asks for."""
        if repetition_penalty(self.loaded) == 1.0:
            return False
        self.settings.remember(self.batch, self.loaded.decoder.vocab_size)
        return True

    def _graph(
        self, options: GenerateOptions, ends: tuple[int, ...], pad: int, steps: int
    ) -> tuple[Callable[[], None], Burst]:
        penalised = self._penalised()
        key = ((chooser_key(options, penalised), ends), steps)
        if key in self.graphs:
            return self.graphs[key]
        choose, stop = make_chooser(options, self.settings, penalised), self._stop(ends)
        into = Burst.empty(steps, self.batch, self.loaded.decoder.num_layers, self.device)

        def work() -> None:
            for index in range(steps):
                self._one_step(choose, stop, pad, into, index)

        replay: Callable[[], None] = work
        if self.capture:
            # What a capture runs on must not be what a user's sequence lives in: state and cache are loaded afterwards. Rows that
            # have ended: what they would do must teach no gate.
            self.state.reset()
            self.state.finished.fill_(True)
            replay = captured(
                lambda: self._one_step(choose, stop, pad, into, 0), work, type(self.loaded.model).__name__
            )
        self.graphs[key] = (replay, into)
        return self.graphs[key]

    @on_its_device
    @torch.inference_mode()
    def prepare(
        self, options: GenerateOptions, ends: tuple[int, ...] = (), pad: int = 0
    ) -> dict[int, tuple[Callable[[], None], Burst]]:
        """The graphs such a call replays, by their steps; those that are missing are captured."""
        refuse_settings(self.loaded, options, self.own_sampling)
        sizes = [size for size in (self.burst, 1) if options.max_new_tokens > size]
        return {size: self._graph(options, ends, pad, size) for size in sizes}

    # A whole call -----------------------------------------------------------------------------------------------------

    def _arguments(self, ids: Tensor, mask: Tensor, begin: int = 0) -> dict[str, Tensor | int]:
        """What the model's forward gets, as far as it takes it."""
        position = (mask.long().cumsum(1) - 1).clamp_min(0) + begin
        given: dict[str, Tensor | int] = {
            "input_ids": ids, "attention_mask": mask, "position_ids": position, "logits_to_keep": 1
        }  # fmt: skip
        return {name: value for name, value in given.items() if takes(self.loaded.model, name)}

    @torch.inference_mode()
    def _prompt(
        self, ids: Tensor, mask: Tensor, gated: bool = True, begin: int = 0
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Pass | None]:
        """(logits of the last tokens, keys and values per layer, what was skipped)."""
        from transformers import DynamicCache

        loaded = self.loaded
        cache = DynamicCache(config=loaded.model.config)
        arguments = self._arguments(ids, mask, begin) | handing(loaded.model, cache) | {"use_cache": True}
        seen: Pass | None = None
        if gated and not self.forced:
            with skipping(
                loaded.model, self.plan.gate, self.plan.standin, decoder=loaded.decoder, keep_passes=True, prefill=True
            ) as run:
                output = loaded.model(**arguments)
            seen = run.passes[0]
        else:
            output = loaded.model(**arguments)
        return output.logits[:, -1], cache_layers(loaded, cache), seen

    def _load(self, ids: Tensor, mask: Tensor, prompt: list[tuple[Tensor, Tensor]], first: Tensor) -> None:
        rows, width = ids.shape
        state = self.state
        state.reset()
        self.cache.load(prompt, width)
        state.slot.fill_(width)
        state.finished[rows:] = True
        state.position[:rows] = mask.sum(dim=1)
        state.first[:rows] = width - mask.sum(dim=1)
        state.tokens[:rows] = first

    @on_its_device
    @torch.inference_mode()
    def run(
        self,
        ids: Tensor,
        mask: Tensor,
        options: GenerateOptions,
        ends: tuple[int, ...] = (),
        pad: int = 0,
        on_tokens: Callable[[Tensor], bool | None] | None = None,
        listener: Listener | None = None,
    ) -> Run:
        """Token ids [rows, width] padded on the left, and their mask. `on_tokens` gets [steps, rows] as they come, and may
        return True to stop; a `listener` gets everything else too."""
        rows, width = ids.shape
        if rows > self.batch:
            raise InputError(f"{rows} prompts at once: this engine was made for {self.batch}")
        check_room(self.loaded, width, options.max_new_tokens)
        if width + options.max_new_tokens > self.max_length:
            raise InputError(
                f"a prompt of {width} tokens and {options.max_new_tokens} new ones exceed the {self.max_length} places of the "
                "engine's cache",
                hint=f"--max-length {width + options.max_new_tokens} or fewer new tokens",
            )
        refuse_recomputing(self.loaded, width, width + options.max_new_tokens)
        steps = options.max_new_tokens - 1
        graphs = self.prepare(options, ends, pad)
        torch.manual_seed(options.seed)
        self.settings.set(options, repetition_penalty(self.loaded))
        penalised = self._penalised()
        self.settings.begin(ids, mask)
        self._sync()
        began = time.perf_counter()
        logits, prompt, seen = self._prompt(ids, mask)
        choice = make_chooser(options, self.settings, penalised)(logits, TwinOps())
        token = choice.token
        self._load(ids, mask, prompt, token)
        if ends:
            self.state.finished[:rows] = (token.unsqueeze(1) == self._stop(ends)).any(dim=1)
        if on_tokens is not None and on_tokens(token.unsqueeze(0).cpu()):
            steps = 0
        if listener is not None and listener.prompt(seen, token, choice.entropy, choice.logprob):
            steps = 0
        self._sync()
        middle = time.perf_counter()
        parts = list(self._bursts(graphs, steps, rows, on_tokens, listener)) if steps > 0 else []
        self._sync()
        layers = self.loaded.decoder.num_layers
        needs = torch.cat([p.needs for p in parts]) if parts else torch.zeros(0, layers, dtype=torch.int32)
        return Run(
            first=token.cpu(),
            tokens=torch.cat([p.tokens for p in parts])[:, :rows] if parts else torch.zeros(0, rows, dtype=torch.long),
            ran=self.program.ran(needs),
            entropy=torch.cat([p.entropy for p in parts])[:, :rows] if parts else torch.zeros(0, rows),
            prompt=seen,
            prefill_seconds=middle - began,
            decode_seconds=time.perf_counter() - middle,
            replays=len(parts),
            steps=needs.shape[0],
        )

    def _bursts(
        self, graphs: dict[int, tuple[Callable[[], None], Burst]], steps: int, rows: int,
        on_tokens: Callable[[Tensor], bool | None] | None, listener: Listener | None,
    ) -> Iterator[Burst]:  # fmt: skip
        """One burst runs ahead of the one that is read."""
        waiting: list[tuple[Burst, Any]] = []
        left, stop = steps, False
        while (left > 0 and not stop) or waiting:
            if left > 0 and not stop:
                size = max(s for s in graphs if s <= left)
                replay, into = graphs[size]
                replay()
                kept = Burst.empty(size, self.batch, self.loaded.decoder.num_layers, "cpu", self.device.type == "cuda")
                kept.copy_(into)
                waiting.append((kept, self._mark()))
                left -= size
                if len(waiting) < 2 and left > 0:
                    continue
            done, event = waiting.pop(0)
            if event is not None:
                event.synchronize()
            yield done
            stop = stop or bool(done.finished[:rows].all())
            if on_tokens is not None and on_tokens(done.tokens[:, :rows]):
                stop = True
            if listener is not None and listener.burst(done, self.program.ran(done.needs)):
                stop = True

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def generate(
        self, prompts: list[str], options: GenerateOptions, on_tokens: Callable[[Tensor], bool | None] | None = None
    ) -> Generated:
        """As `runtime.generate.generate` does it. In a batch, a row that would skip gets the MLP that another row needs."""
        inputs = encode_prompts(self.loaded, prompts, options)
        ends = tuple(sorted(end_tokens(self.loaded, options)))
        done = self.run(
            inputs["input_ids"], inputs["attention_mask"], options, ends, self.loaded.tokenizer.pad_token_id, on_tokens
        )
        self.last = done
        return describe(self.loaded, done, inputs["attention_mask"], set(ends))


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has such an argument."""
    return name in inspect.signature(model.forward).parameters
