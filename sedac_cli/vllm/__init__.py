"""SEDAC inside vLLM: a plugin that gates the MLPs of the model vLLM serves, and touches none of vLLM's files.

    SEDAC_ENABLED=1 SEDAC_GATE=learned:sedac_data/sedac_gates.pth@0.25 vllm serve MODEL

`plugin.register` is what vLLM calls in each of its processes; it costs nothing unless a gate is asked for.
"""

from __future__ import annotations

from importlib.util import find_spec


def installed() -> bool:
    """Whether this interpreter has vLLM: a folder that happens to bear the name does not count."""
    spec = find_spec("vllm")
    return spec is not None and spec.origin is not None
