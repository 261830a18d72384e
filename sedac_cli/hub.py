"""Whether the model hub answers: asked once, so that a machine without network hears so at once and not after retries.

go_offline_if_unreachable()      # before transformers or datasets are imported
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT = 3.0


def is_hub_ref(ref: str) -> bool:
    """A model or data set that is neither built in nor a path."""
    return not (ref.startswith(("builtin:", "shape:", ".", "/", "~")) or Path(ref).exists())


def hub_error() -> str | None:
    """Why the hub cannot be reached, or None. Behind a proxy only the proxy can tell, so there nothing is asked."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    place = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((place.hostname or "", place.port or 443), timeout=TIMEOUT):
            return None
    except OSError as error:
        return f"{place.hostname}: {error.strerror or error}"


def go_offline_if_unreachable() -> None:
    """Let the hub's clients use their cache alone; they read this variable when they are imported."""
    if "HF_HUB_OFFLINE" not in os.environ and hub_error():
        os.environ["HF_HUB_OFFLINE"] = "1"
