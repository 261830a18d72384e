"""Where the built-in model and text live: `data/` in a checkout, `sedac_cli/_data` in an installed wheel.

model_folder = data_dir() / "models" / "tiny"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sedac_cli.errors import InputError


def data_dir() -> Path:
    here = Path(__file__).resolve().parent
    for candidate in (here / "_data", here.parent / "data"):
        if (candidate / "models").is_dir():
            return candidate
    raise InputError(
        "the built-in model and text are missing from this installation",
        hint="reinstall with `pip install --force-reinstall sedac`, or use a local model and text file",
    )


def builtin_models() -> list[dict[str, Any]]:
    """Name, architecture, layers, width, vocabulary and size of every built-in model."""
    found = []
    for folder in sorted((data_dir() / "models").iterdir()):
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            found.append(
                {
                    "name": f"builtin:{folder.name}",
                    "architecture": config["model_type"],
                    "layers": config["num_hidden_layers"],
                    "hidden_size": config["hidden_size"],
                    "vocab_size": config["vocab_size"],
                    "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                }
            )
    return found


def builtin_texts() -> list[dict[str, Any]]:
    """Name, split and size of every built-in text."""
    found = []
    for file in sorted((data_dir() / "text").glob("*-*.txt")):
        name, _, split = file.stem.rpartition("-")
        found.append({"name": f"builtin:{name}", "split": split, "bytes": file.stat().st_size})
    return found
