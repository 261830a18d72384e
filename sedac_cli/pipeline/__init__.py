"""The library behind the verbs: collect, train_probes, calibrate, validate. No printing, no exits, no console.

Work that takes time accepts a progress factory with tqdm's interface; by default it is silent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm import tqdm

Progress = Callable[..., Any]
quiet_progress: Progress = partial(tqdm, disable=True)
