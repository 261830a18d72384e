"""Where an engine is configured: settings are read once, checked against the model, and travel to all workers from here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sedac_cli.errors import InputError, UsageError
from sedac_cli.vllm import handshake
from sedac_cli.vllm.plan import ModelShape, artifacts_digest, build_plan
from sedac_cli.vllm.requests import DEFAULT, Wish, read_wish
from sedac_cli.vllm.settings import KEY, Settings, read_settings, settings_of
from sedac_cli.vllm.switch import Switch
from sedac_cli.vllm.worker import check_engine


@contextmanager
def settings_for(arguments: Any, switch: Switch | None = None) -> Iterator[Settings | None]:
    """Resolve what was asked for, and have the configuration made inside carry it."""
    given = arguments.additional_config
    if given is not None and not isinstance(given, dict):
        raise UsageError(
            f"additional_config is {type(given).__name__}: sedac needs a dictionary there to put its settings in"
        )
    given = dict(given or {})
    asked = given.pop(KEY, None)
    if isinstance(asked, dict) and "version" in asked:  # configured before: arguments may be used twice
        settings = settings_of({KEY: asked})
    else:
        settings = read_settings(asked, os.environ, None if switch is None else switch.settings)
        if settings is not None and switch is not None:
            import vllm

            switch.require(vllm.__version__)
        if settings is not None:
            settings = settings.model_copy(update={"artifacts": artifacts_digest(settings)})
    # Told to be off, too: a worker that is turned on by its environment must hear of it.
    given[KEY] = (settings or Settings.model_validate({})).model_dump()
    before, arguments.additional_config = arguments.additional_config, given
    try:
        yield settings
    finally:
        arguments.additional_config = before


def check(config: Any, settings: Settings) -> None:
    """Refuse now, in the process the user watches, what a worker would refuse after loading the model."""
    if KEY not in config.additional_config:
        raise InputError("vLLM did not take the settings of sedac into its configuration")
    plan = build_plan(settings, ModelShape.of(config.model_config))
    check_engine(config, plan.gate)
    if not plan.gate.trivial:
        # Inside an opaque operator nothing is compiled: a fused kernel of vLLM's must stand for what inductor would fuse.
        text = config.model_config.hf_text_config
        act = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None) or "silu"
        fused = "gelu_and_mul" if "gelu" in str(act) else "silu_and_mul"
        custom = config.compilation_config.custom_ops
        if f"+{fused}" not in custom and f"-{fused}" not in custom:
            custom.append(f"+{fused}")
    watch_requests()
    handshake.report(
        "engine",
        {
            "version": settings.version, "pid": os.getpid(), "digest": settings.digest, "gate": plan.gate.name,
            "workers": config.parallel_config.world_size_across_dp,
        },
    )  # fmt: skip


def watch_requests() -> None:
    """A request whose `sedac` arguments make no sense is answered with an error, and the engine goes on. One with wishes of its
    own shares cached prefixes only with those that wish the same: keys and values made under skipping are not a dense model's."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    process, verify = InputProcessor.process_inputs, SamplingParams._verify_args
    if hasattr(process, "sedac"):
        return

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        wish = DEFAULT
        for value in (*args, *kwargs.values()):
            if extra := getattr(value, "extra_args", None):
                wish = valid_wish(extra)
        request = process(self, *args, **kwargs)
        if wish != DEFAULT:
            request.cache_salt = f"{request.cache_salt or ''}|sedac {wish}"
        return request

    def verify_args(self: Any) -> None:
        """Where a server reads a request: once its answer streams, the status is sent and can no longer be 400."""
        verify(self)
        valid_wish(self.extra_args)

    process_inputs.sedac = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs
    SamplingParams._verify_args = verify_args


def valid_wish(extra_args: Any) -> Wish:
    from vllm.exceptions import VLLMValidationError  # any other error is the server's fault, and the answer a 500

    try:
        return read_wish(extra_args)
    except UsageError as error:
        raise VLLMValidationError(error.message) from None
