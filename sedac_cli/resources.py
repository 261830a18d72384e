"""Where the built-in model and text live: `data/` in a checkout, `sedac_cli/_data` in an installed wheel.

model_folder = data_dir() / "models" / "tiny"
"""

from __future__ import annotations

from pathlib import Path

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
