"""SEDAC: skip the MLPs that a token does not need, keep attention whole, and measure both sides of the bargain.

    from sedac_cli import load_model, skipping
    loaded = load_model("builtin:tiny")
    with skipping(loaded.model, "random:0.3") as run:
        loaded.model(**loaded.tokenizer("The sea was", return_tensors="pt"))
    print(run.skip_ratio)

Importing this package imports neither torch nor transformers; the names below are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "load_model": "sedac_cli.models",
    "build_gate": "sedac_cli.gates.registry",
    "skipping": "sedac_cli.runtime.skip",
    "create_sedac_engine": "sedac_cli.engine",
    "create_pipeline": "sedac_cli.engine",
    "DeepThinking": "sedac_cli.gates.deep",
    "speculate": "sedac_cli.runtime.speculate",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sedac_cli' has no attribute '{name}'")
