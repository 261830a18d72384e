"""OpenAI's routes: /v1/completions, /v1/chat/completions, /v1/models, whole or as a stream of events.

Beyond OpenAI's fields every answer has `sedac`: what was skipped to make it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from sedac_cli.runtime.stream import Row, StreamToken
from sedac_cli.serve.call import Call, Choice, EventStream, answer, take
from sedac_cli.serve.engine import Finished
from sedac_cli.serve.errors import ApiError
from sedac_cli.serve.schema import ChatRequest, CompletionRequest, OpenAIRequest
from sedac_cli.serve.state import Served

DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Form:
    """Where chat and plain completions differ: names, and how a piece of text lies in a choice."""

    prefix: str
    kind: str
    chunk_kind: str
    whole: Callable[[Choice], dict[str, Any]]
    part: Callable[[str], dict[str, Any]]
    logprobs: Callable[[Served, list[StreamToken], list[str]], dict[str, Any]]


def completion_logprobs(served: Served, tokens: list[StreamToken], pieces: list[str]) -> dict[str, Any]:
    offsets = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    return {
        "tokens": [served.prompts.decode_one(t.token) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        # Tokens that are parts of a character look alike: the likeliest keeps the name, so the least come first here.
        "top_logprobs": [{served.prompts.decode_one(i): p for i, p in reversed(t.top)} for t in tokens],
        "text_offset": offsets,
    }


def chat_logprobs(served: Served, tokens: list[StreamToken], pieces: list[str]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = served.prompts.decode_one(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    rows = [entry(t.token, t.logprob) | {"top_logprobs": [entry(i, p) for i, p in t.top]} for t in tokens]
    return {"content": rows, "refusal": None}


COMPLETION = Form("cmpl", "text_completion", "text_completion", lambda c: {"text": c.text}, lambda s: {"text": s},
                  completion_logprobs)  # fmt: skip
CHAT = Form(
    "chatcmpl", "chat.completion", "chat.completion.chunk",
    lambda c: {"message": {"role": "assistant", "content": c.text, "refusal": None}},
    lambda s: {"delta": {"content": s}}, chat_logprobs,
)  # fmt: skip


def openai_routes(served: Served) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(served)]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.check_model(name)
        return model_card(served)

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        served.check_model(body.model)
        rows = []
        for prompt in body.prompts:
            ids = await served.prompts.encode(prompt)
            length = served.prompts.new_tokens(ids, body.max_tokens, DEFAULT_COMPLETION_TOKENS, "max_tokens")
            rows += choice_rows(body, ids, length, body.logprobs or 0)
        return await respond(served, request, body, rows, COMPLETION, body.logprobs is not None)

    @router.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        served.check_model(body.model)
        ids = await served.prompts.encode_chat([message.plain() for message in body.messages])
        length = served.prompts.new_tokens(ids, body.new_tokens, served.limits.max_new_tokens, "max_tokens")
        rows = choice_rows(body, ids, length, body.top_logprobs or 0)
        return await respond(served, request, body, rows, CHAT, bool(body.logprobs))

    return router


def model_card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name, "object": "model", "created": served.started, "owned_by": "sedac",
        "max_model_len": served.prompts.context, "gate": served.gate,
    }  # fmt: skip


def choice_rows(body: OpenAIRequest, ids: tuple[int, ...], length: int, logprobs: int) -> list[Row]:
    return [
        body.row(ids, length, choice, dense=body.sedac.dense, temperature=DEFAULT_TEMPERATURE, logprobs=logprobs)
        for choice in range(body.choices)
    ]


async def respond(
    served: Served, request: Request, body: OpenAIRequest, rows: list[Row], form: Form, logprobs: bool
) -> Any:
    if body.stream_options and not body.stream:
        raise ApiError(400, "'stream_options' goes with 'stream': true", param="stream_options")
    if rows and rows[0].top_logprobs and not served.top_logprobs:
        name = "top_logprobs" if form is CHAT else "logprobs"
        raise ApiError(400, f"{name}: this server knows only the probability of the token it chose; send 0", param=name)
    call = Call(served.engine, "chat" if form is CHAT else "completions", rows, body.stops)
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(call, chunks(served, call, head, form, body.choices, logprobs, usage))

    def build(choices: list[Choice]) -> dict[str, Any]:
        found = [
            {
                "index": index,
                **form.whole(choice),
                "logprobs": form.logprobs(served, choice.tokens, choice.pieces) if logprobs else None,
                "finish_reason": reason(choice),
            }
            for index, choice in enumerate(choices)
        ]
        return head | {"object": form.kind, "choices": found} | accounts(choices, body.choices)

    return await answer(request, call, build)


async def chunks(
    served: Served, call: Call, head: dict[str, Any], form: Form, n: int, logprobs: bool, with_usage: bool
) -> AsyncIterator[str]:
    found = [Choice() for _ in call.jobs]
    head = head | {"object": form.chunk_kind}

    def chunk(index: int, part: dict[str, Any], marks: Any = None, end: str | None = None) -> str:
        return json.dumps(
            head | {"choices": [{"index": index, **part, "logprobs": marks, "finish_reason": end}]}, ensure_ascii=False
        )

    if form is CHAT:
        for index in range(len(found)):
            yield chunk(index, {"delta": {"role": "assistant", "content": ""}})
    try:
        async for index, event in call.events():
            before = len(found[index].text)
            take(found[index], event)
            if isinstance(event, Finished):
                yield chunk(index, {"delta": {}} if form is CHAT else {"text": ""}, end=event.reason)
            elif event.text or logprobs:
                marks = form.logprobs(served, [event.token], [event.text]) if logprobs else None
                if marks and "text_offset" in marks:
                    marks["text_offset"] = [before]
                yield chunk(index, form.part(event.text), marks)
        if with_usage:
            yield json.dumps(head | {"choices": []} | accounts(found, n))
    except ApiError as error:
        yield json.dumps(error.document)
    yield "[DONE]"


def reason(choice: Choice) -> str:
    assert choice.finished is not None
    return choice.finished.reason


def accounts(choices: list[Choice], n: int) -> dict[str, Any]:
    """`usage`, as OpenAI counts: a prompt once, however many answers it was given; and what was skipped."""
    counts = [c.finished.counts for c in choices if c.finished]
    prompt = sum(c.prompt_tokens for c in counts[::n])
    new = sum(c.new_tokens for c in counts)
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return {"usage": usage, "sedac": summary(choices)}


def summary(choices: list[Choice]) -> dict[str, Any]:
    """What was computed for an answer; `calls` and `exits` are what the server's counters rose by."""
    counts = [c.finished.counts for c in choices if c.finished]
    exits: dict[str, int] = {}
    for one in counts:
        for layer, number in sorted(one.exits.items()):
            exits[str(layer)] = exits.get(str(layer), 0) + number
    mlps = sum(sum(c.processed.values()) * c.num_layers for c in counts)
    tokens = [t for c in choices for t in c.tokens]
    return {
        "skip_ratio": sum(c.skipped for c in counts) / max(1, mlps),
        "avg_exit_layer": sum(c.exit_layers for c in counts) / max(1, sum(c.new_tokens for c in counts)),
        "avg_entropy_bits": sum(t.entropy for t in tokens) / max(1, len(tokens)),
        "calls": {phase: sum(c.processed[phase] for c in counts) for phase in ("prefill", "decode")},
        "exits": exits,
    }
