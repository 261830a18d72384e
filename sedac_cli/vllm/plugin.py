"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes, before it configures anything.

Two functions of vLLM are wrapped, and both only look whether a gate is asked for: where an engine is configured (the settings
go into additional_config, and are refused there if they make no sense), and where a worker is made (it gates the model it will
load). Without `SEDAC_ENABLED=1`, without "sedac" in additional_config and without the settings file that `sedac patch` leaves,
they pass everything through as it is.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sedac_cli.vllm.switch import Switch

KEY = "sedac"
VARIABLE = "SEDAC_ENABLED"


def register() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase

    if not hasattr(EngineArgs.create_engine_config, "sedac"):
        EngineArgs.create_engine_config = _configuring(EngineArgs.create_engine_config)
    if not hasattr(WorkerBase.__init__, "sedac"):
        WorkerBase.__init__ = _making(WorkerBase.__init__)
    if os.environ.get("SEDAC_HANDSHAKE_DIR"):
        from sedac_cli.vllm import handshake

        handshake.report("process", {"pid": os.getpid(), "command": " ".join(sys.argv[:2])})


def _configuring(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _asked(self.additional_config):
            return original(self, *args, **kwargs)
        from sedac_cli.errors import SedacError
        from sedac_cli.vllm import engine

        try:
            with engine.settings_for(self, _switch()) as settings:
                config = original(self, *args, **kwargs)
            if settings is not None:
                engine.check(config, settings)
        except SedacError as error:  # vLLM prints a traceback, whose last line has no room for what to do
            logging.getLogger("vllm.sedac").error(
                "sedac: %s%s", error.message, f" ({error.hint})" if error.hint else ""
            )
            raise
        return config

    create_engine_config.sedac = True  # type: ignore[attr-defined]
    return create_engine_config


def _making(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if not _asked(vllm_config.additional_config):
            return
        from sedac_cli.errors import InputError
        from sedac_cli.vllm.settings import settings_of
        from sedac_cli.vllm.worker import prepare

        if not _has_key(vllm_config.additional_config):
            raise InputError(
                "sedac is turned on here, but the engine was configured without it: its compile cache would not know",
                hint="set it where the engine is started, or pass --additional-config '{\"sedac\": {...}}'",
            )
        settings = settings_of(vllm_config.additional_config)
        if settings is not None:
            prepare(self, settings)

    init.sedac = True  # type: ignore[attr-defined]
    return init


def _has_key(additional_config: Any) -> bool:
    return isinstance(additional_config, dict) and KEY in additional_config


def _asked(additional_config: Any) -> bool:
    """Cheap: nothing of ours is imported unless it is needed."""
    if _has_key(additional_config):
        return True
    if VARIABLE in os.environ:
        return os.environ[VARIABLE].strip().lower() not in ("0", "", "false", "no", "off")
    return _switch() is not None


def _switch() -> Switch | None:
    """What `sedac patch` has left in this environment."""
    from sedac_cli.vllm.switch import read_switch

    return read_switch(Path(sys.prefix))
