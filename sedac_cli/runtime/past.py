"""The keys and values of earlier tokens, by whichever name the installed transformers gives them.

From 5.24 on models take and return a `cache`; before, and in code that comes with a model, it was `past_key_values`.

    out = model(input_ids=ids, **handing(model, past), use_cache=True)
    past = kept(out)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from sedac_cli.structure import CACHE_NAMES


def past_in(called: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, or None."""
    return next((called[name] for name in CACHE_NAMES if called.get(name) is not None), None)


def name_in(signature: inspect.Signature) -> str | None:
    """What a forward of this signature calls it."""
    return next((name for name in CACHE_NAMES if name in signature.parameters), None)


def handing(model: nn.Module, cache: Any) -> dict[str, Any]:
    """`cache` as the argument that the model takes; one that hides what it takes understands the older name."""
    return {name_in(inspect.signature(model.forward)) or "past_key_values": cache}


def renamed(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with a cache, whatever it is called there, as the argument that the model takes."""
    cache = past_in(inputs)
    others = {name: value for name, value in inputs.items() if name not in CACHE_NAMES}
    return others if cache is None else others | handing(model, cache)


def kept(output: Any) -> Any:
    """The cache that a model returned, or None."""
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)


def past_length(cache: Any) -> int:
    """Tokens the cache already holds."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
