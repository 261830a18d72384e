"""Between vLLM's model runners and a session: which rows does the coming step have, of which requests, in which phase?

A row's phase is its token's: a position before the end of the prompt is prefill. So a prompt of one token is prefill, a
verified draft of five is decode, and a request that is computed again after preemption keeps its phases.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from sedac_cli.errors import InputError
from sedac_cli.vllm.requests import DEFAULT, Wish, wish_or_dense
from sedac_cli.vllm.session import Session, StepRows


def attach(runner: Any, session: Session) -> str:
    """Have the runner tell the session of every step; which runner it is."""
    if hasattr(runner, "_model_forward") and hasattr(runner, "input_batch"):
        _attach_v1(runner, session)
        return "V1"
    state = getattr(runner, "model_state", None)
    if state is not None and hasattr(state, "prepare_inputs") and hasattr(state, "add_request"):
        _attach_v2(runner, state, session)
        return "V2"
    raise InputError(f"sedac does not know the model runner {type(runner).__module__}.{type(runner).__name__}")


def step_rows(lengths: np.ndarray, computed: np.ndarray, prompts: np.ndarray, wishes: Sequence[Wish]) -> StepRows:
    """From requests to rows: `lengths` tokens each, after `computed` earlier ones, of prompts this long."""
    total = int(lengths.sum())
    starts = np.cumsum(lengths) - lengths
    position = (np.arange(total) + np.repeat(computed - starts, lengths)).astype(np.int32)
    prefill = position < np.repeat(prompts, lengths)
    dense = strict = None
    if any(wish is not DEFAULT for wish in wishes):
        dense = np.repeat(np.array([wish.dense for wish in wishes], dtype=bool), lengths)
        if any(wish.threshold is not None for wish in wishes):
            values = [np.nan if wish.threshold is None else wish.threshold for wish in wishes]
            strict = np.repeat(np.array(values, dtype=np.float32), lengths)
    return StepRows(position, prefill, dense, strict)


def _attach_v1(runner: Any, session: Session) -> None:
    original = runner._model_forward

    def wish_of(request: Any) -> Wish:
        wish = getattr(request, "_sedac_wish", None)
        if wish is None:
            wish = request._sedac_wish = wish_or_dense(getattr(request.sampling_params, "extra_args", None))
        return wish

    def rows() -> StepRows:
        batch = runner.input_batch
        count = batch.num_reqs
        lengths = np.diff(runner.query_start_loc.np[: count + 1]).astype(np.int64)
        wishes = [wish_of(runner.requests[name]) for name in batch.req_ids[:count]]
        return step_rows(
            lengths, batch.num_computed_tokens_cpu[:count].astype(np.int64), batch.num_prompt_tokens[:count], wishes
        )

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        session.begin(rows())
        try:
            return original(*args, **kwargs)
        finally:
            session.end()

    runner._model_forward = model_forward


def _attach_v2(runner: Any, state: Any, session: Session) -> None:
    add, prepare, prepare_dummy = state.add_request, state.prepare_inputs, state.prepare_dummy_inputs
    execute = runner.execute_model
    takes = list(inspect.signature(execute).parameters)
    if "dummy_run" not in takes:
        raise InputError(f"sedac does not know this V2 model runner: execute_model takes {', '.join(takes)}")
    dummy_place = takes.index("dummy_run")
    wishes: dict[int, Wish] = {}
    dummy = False

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        nonlocal dummy
        dummy = args[dummy_place] if dummy_place < len(args) else kwargs.get("dummy_run", False)
        try:
            return execute(*args, **kwargs)
        finally:
            session.end()

    def add_request(index: int, request: Any, *args: Any, **kwargs: Any) -> Any:
        wishes[index] = wish_or_dense(getattr(request.sampling_params, "extra_args", None))
        return add(index, request, *args, **kwargs)

    def prepare_inputs(batch: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if dummy:
            session.begin(None)
            return prepare(batch, requests, *args, **kwargs)
        count = batch.num_reqs
        slots = batch.idx_mapping_np[:count]
        session.begin(
            step_rows(
                batch.num_scheduled_tokens[:count].astype(np.int64),
                batch.num_computed_tokens_np[:count].astype(np.int64),
                requests.prompt_len.np[slots],
                [wishes.get(int(slot), DEFAULT) for slot in slots],
            )
        )
        return prepare(batch, requests, *args, **kwargs)

    def prepare_dummy_inputs(*args: Any, **kwargs: Any) -> Any:
        session.begin(None)
        return prepare_dummy(*args, **kwargs)

    runner.execute_model = execute_model
    state.add_request, state.prepare_inputs, state.prepare_dummy_inputs = (
        add_request,
        prepare_inputs,
        prepare_dummy_inputs,
    )
