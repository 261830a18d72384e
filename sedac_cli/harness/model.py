"""`sedac`, a model of the lm-evaluation-harness: its Hugging Face model, with a gate in force whenever it is asked.

Always true: scoring, batching and prompts are the harness's own; with gate `never` so is every score, bit for bit. Padding
is no token to a gate: the harness pads on the right without a mask, so each row's length is known again by its tokens.

    lm = SedacLM(pretrained="builtin:tiny", gate="always:14", batch_size=8)
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])
    lm.skip_ratio
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.models import BUILTIN, adopt_model, resolve
from sedac_cli.runtime.plan import Plan, make_plan
from sedac_cli.runtime.skip import SkipRun, skipping


@register_model("sedac")
class SedacLM(HFLM):
    """Takes what `hf` takes, and `gate`: a spec of `sedac ls gates`, with `;` for the commas that would end a model
    argument (`gate=stability:tau=0.9;k=3`), or a `Plan`. `gate_seed` seeds `random`.

    Text that is scored stands for the phase a gate acts in: a gate that leaves prompts alone skips there too.
    """

    def __init__(
        self, pretrained: Any, gate: str | Plan = "never", gate_seed: int = 0, backend: str = "causal", **options: Any
    ) -> None:
        if backend != "causal":
            raise UsageError(f"backend={backend}: sedac gates decoder-only models", hint="backend=causal")
        name = pretrained
        if isinstance(pretrained, str) and pretrained.startswith(BUILTIN):
            pretrained = resolve(pretrained)[0]
        super().__init__(pretrained, backend="causal", **options)
        ref = name if isinstance(name, str) else None
        self.loaded = adopt_model(self.model, self.tokenizer, ref)
        decoder, identity = self.loaded.decoder, self.loaded.identity
        if isinstance(gate, str):
            gate = make_plan(gate.replace(";", ","), decoder, identity, seed=int(gate_seed))
        self.plan = gate
        self.gated = True
        """False: the dense model."""
        self._known: set[int] = set()
        self._end_in_zero: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Count skips anew."""
        self._skipped, self._tokens = 0, 0

    @property
    def skip_ratio(self) -> float:
        """Skipped (token, layer) MLPs / (tokens x all layers) since the last reset; padding is not counted."""
        return self._skipped / max(1, self._tokens * self.loaded.decoder.num_layers)

    @property
    def tokens(self) -> int:
        """Tokens that went through the model since the last reset."""
        return self._tokens

    @contextmanager
    def in_force(self, prefill: bool | None = None) -> Iterator[SkipRun]:
        plan = self.plan
        with skipping(self.model, plan.gate, plan.standin, decoder=self.loaded.decoder, prefill=prefill) as run:
            yield run
        self._tokens += run.tokens
        self._skipped += sum(run.skipped_per_layer)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
        inputs = [(context + more)[-(self.max_length + 1) :][:-1] for _, context, more in requests]
        self._known = {hash(tuple(ids)) for ids in inputs}
        self._end_in_zero = sorted({len(ids) for ids in inputs if ids[-1] == 0}, reverse=True)
        try:
            return super()._loglikelihood_tokens(requests, *args, **options)
        finally:
            self._known = set()

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        # Nothing known: the harness tries out batch sizes.
        if not self.gated or not self._known:
            return super()._model_call(inps, attn_mask, labels)
        with self.in_force(prefill=self.plan.gate.guards.prefill) as run:
            run.real = self._real(inps)
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if not self.gated:
            return super()._model_generate(context, max_length, stop, **options)
        with self.in_force():
            return super()._model_generate(context, max_length, stop, **options)

    def _real(self, inps: Tensor) -> Tensor:
        """[B, T]: each row is a known request and, on its right, zeros. The longest such request counts: a token taken
        for padding would be denied its skips, padding taken for a token changes no score."""
        width = inps.shape[1]
        lengths = []
        for row in inps.tolist():
            least = next((n for n in range(width, 0, -1) if row[n - 1]), 0)
            longer = (n for n in self._end_in_zero if least < n <= width and hash(tuple(row[:n])) in self._known)
            lengths.append(next(longer, least))
        return torch.arange(width, device=inps.device) < torch.tensor(lengths, device=inps.device).unsqueeze(1)
