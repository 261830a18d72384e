"""The opaque operators that stand in a gated model: torch.compile sees names and shapes, vLLM's graphs what they launch.

`look` reads the state entering a layer. It says that it changes `hidden`, which it does not: so the compiler keeps it, and in
its place. `mlp` is a layer's MLP, or what stands in for it. `norm` is the norm ahead of it, where a session has taken that over.
All know their layer by number; a process has one gated model.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from sedac_cli.errors import InputError

if TYPE_CHECKING:
    from sedac_cli.vllm.session import Session

_library: torch.library.Library | None = None
_session: weakref.ref[Session] | None = None


def current() -> Session | None:
    return None if _session is None else _session()


def take(session: Session) -> None:
    """Make `session` the one whose model the operators serve."""
    global _session
    if current() is not None:
        raise InputError("this process already holds a gated engine", hint="delete it first, or start another process")
    register()
    _session = weakref.ref(session)


def release(session: Session) -> None:
    global _session
    if current() is session:
        _session = None


def register() -> None:
    global _library
    if _library is not None:
        return
    from vllm.utils.torch_utils import direct_register_custom_op

    _library = torch.library.Library("sedac", "FRAGMENT")
    direct_register_custom_op("look", look, mutates_args=["hidden"], fake_impl=_look_shape, target_lib=_library)
    direct_register_custom_op("mlp", mlp, fake_impl=_mlp_shape, target_lib=_library)
    direct_register_custom_op("norm", norm, fake_impl=_norm_shapes, target_lib=_library)


def look(hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
    _live().look(layer, hidden, residual)


def mlp(x: torch.Tensor, layer: int) -> torch.Tensor:
    return _live().mlp(layer, x)


def norm(hidden: torch.Tensor, residual: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _live().norm(layer, hidden, residual)


def _look_shape(hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
    return None


def _mlp_shape(x: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(x)


def _norm_shapes(hidden: torch.Tensor, residual: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden), torch.empty_like(residual)


def _live() -> Session:
    session = current()
    if session is None:
        raise InputError("a gated model runs, but its session is gone")
    return session
