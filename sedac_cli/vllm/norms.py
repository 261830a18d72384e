"""The norm ahead of an MLP, found by what a layer does, and run by launches of ours: with the layer's router, or alone.

vLLM adds the residual and norms in one launch; a router behind it would be one more, and the MLP would wait for both. Where the
norm is one we know, norm and router are one launch (`norm_route`), and the MLP's first begins once the normed rows are there.
Rows too many for that take the sum and the norm as one launch, and the router as another. In both the sum is rounded before it
is normed, as under Hugging Face, so it is the same to the bit whatever the number of rows.

    norm = MlpNorm.of(layer)                        # None: it stays what vLLM launches
    normed, total = norm.add(hidden, residual)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.gpu import decode
from sedac_cli.gpu.compile import KINDS
from sedac_cli.gpu.probe import RouterWeights
from sedac_cli.gpu.skinny import BATCH_ROWS
from sedac_cli.vllm.surgery import RESIDUAL, STREAM, Layer

NORMS = {"RMSNorm": False, "GemmaRMSNorm": True}
"""vLLM's norms by class, and whether the weight is stored less one."""
ROUTED_ROWS = BATCH_ROWS
"""Up to here norm and router are one launch: every block of a row norms all of it."""
PLACES = "positions"


@dataclass(frozen=True)
class MlpNorm:
    module: nn.Module
    weight: Tensor
    eps: float
    plus_one: bool

    @classmethod
    def of(cls, layer: Layer) -> MlpNorm | None:
        module = norm_ahead(layer)
        if module is None or "forward" in vars(module):
            return None
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        whole = getattr(module, "variance_size_override", None) is None
        alone = [parameter is weight for parameter in module.parameters()] == [True]
        if not whole or not alone or weight is None or eps is None:
            return None
        if weight.dim() != 1 or weight.dtype not in KINDS or not weight.is_contiguous():
            return None
        return cls(module, weight.data, float(eps), NORMS[type(module).__name__])

    def takes(self, hidden: Tensor, residual: Tensor) -> bool:
        return all(
            rows.dim() == 2
            and rows.shape == hidden.shape
            and rows.shape[1] == len(self.weight)
            and rows.dtype == self.weight.dtype
            and rows.stride(1) == 1
            for rows in (hidden, residual)
        )

    @torch.inference_mode()
    def agrees(self) -> bool:
        """Whether ours gives what the layer's own norm gives, on rows made up: a class of the same name may be another's."""
        x, residual = (torch.randn(3, len(self.weight), device=self.weight.device).to(self.weight) for _ in range(2))
        expected = self.module(x.clone(), residual.clone())
        return all(
            bool((ours - theirs).float().norm() < 2e-2 * theirs.float().norm())
            for ours, theirs in zip(self.add(x, residual), expected, strict=True)
        )

    def add(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(normed sum, sum), both new."""
        return decode.add_rms_norm(hidden, residual, self.weight, self.eps, self.plus_one)

    def route(
        self, hidden: Tensor, residual: Tensor, router: RouterWeights, scratch: Tensor, **decision: Any
    ) -> tuple[Tensor, Tensor]:
        """The same, and the router's decision on it, in one launch; `decision` is what `norm_route` takes for that."""
        total = torch.empty_like(hidden)
        normed, _, _ = decode.norm_route(
            hidden, self.weight, self.eps, router, scratch, plus_one=self.plus_one, residual=residual, total=total, **decision
        )  # fmt: skip
        return normed, total


def norm_ahead(layer: Layer) -> nn.Module | None:
    """The norm that a layer gives its residual to and whose rows, as they are, it gives its MLP, or None.

    Seen by running the layer once with parts that do nothing but give new rows: names differ from family to family, and where the
    rows go depends on the configuration. A layer that needs more than rows to run is not known."""
    seen = _Dataflow(layer)
    try:
        seen.run()
    except Exception:
        return None
    return seen.found()


class _Dataflow:
    """One run of a layer whose parts are replaced: who was called with what, and who made what the MLP takes."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self.calls: list[tuple[nn.Module, Tensor | None, Tensor]] = []
        """Of norms: module, residual, the rows it gave."""
        self.taken: list[tuple[Tensor, bool]] = []
        """What the MLP was called with, and whether somebody had written into it."""

    def run(self) -> None:
        module = self.layer.module
        if "forward" in vars(module):
            raise TypeError("a layer that somebody else has wrapped")
        given: dict[str, Any] = {}
        for name, parameter in inspect.signature(module.forward).parameters.items():
            if name in (STREAM, RESIDUAL):
                given[name] = self.rows()
            elif name == PLACES:
                given[name] = torch.zeros(1, dtype=torch.long, device=self.rows().device)
            elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
                raise TypeError(f"{name} is not known")
        parts = list(module.children())
        before = [vars(part).get("forward") for part in parts]
        try:
            for part in parts:
                part.forward = self.stub(part)  # type: ignore[method-assign]
            with torch.no_grad():
                module.forward(**given)
        finally:
            for part, forward in zip(parts, before, strict=True):
                del part.forward
                if forward is not None:
                    part.forward = forward  # type: ignore[method-assign]

    def rows(self) -> Tensor:
        first = next(self.layer.module.parameters())
        return torch.zeros(1, 1, device=first.device)

    def stub(self, part: nn.Module) -> Callable[..., Any]:
        def norm(x: Tensor, residual: Tensor | None = None) -> Any:
            out = self.rows()
            self.calls.append((part, residual, out))
            return out if residual is None else (out, self.rows())

        def mlp(x: Tensor) -> Tensor:
            self.taken.append((x, x._version > 0))
            return self.rows()

        if part is self.layer.mlp:
            return mlp
        return norm if type(part).__name__ in NORMS else lambda *args, **kwargs: self.rows()

    def found(self) -> nn.Module | None:
        if len(self.taken) != 1 or self.taken[0][1]:
            return None
        makers = [(part, residual) for part, residual, out in self.calls if out is self.taken[0][0]]
        if len(makers) != 1 or makers[0][1] is None:
            return None
        part = makers[0][0]
        return part if [other for other, _, _ in self.calls].count(part) == 1 else None
