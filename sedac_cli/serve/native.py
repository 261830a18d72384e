"""The toolkit's own routes: /generate and /batch_generate, plain in and plain out, with what every token skipped."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from sedac_cli.serve.call import Call, Choice, answer
from sedac_cli.serve.openai import summary
from sedac_cli.serve.schema import BatchGenerateRequest, GenerateRequest
from sedac_cli.serve.state import Served


def native_routes(served: Served) -> APIRouter:
    router = APIRouter()

    @router.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> Any:
        return (await run(served, request, "generate", body, [body.prompt]))["results"][0]

    @router.post("/batch_generate")
    async def batch_generate(body: BatchGenerateRequest, request: Request) -> Any:
        return await run(served, request, "batch_generate", body, body.prompts)

    return router


async def run(
    served: Served, request: Request, endpoint: str, body: GenerateRequest | BatchGenerateRequest, prompts: list[str]
) -> dict[str, Any]:
    rows = []
    for index, prompt in enumerate(prompts):
        if body.chat:
            ids = await served.prompts.encode_chat([{"role": "user", "content": prompt}])
        else:
            ids = await served.prompts.encode(prompt)
        length = served.prompts.new_tokens(ids, body.max_new_tokens, body.max_new_tokens, "max_new_tokens")
        rows.append(body.row(ids, length, index, dense=body.dense, temperature=0.0, logprobs=0))
    call = Call(served.engine, endpoint, rows, body.stops)

    def build(choices: list[Choice]) -> dict[str, Any]:
        return {"results": [result(served, c, body.details) for c in choices]} | summary(choices)

    return await answer(request, call, build)


def result(served: Served, choice: Choice, details: bool) -> dict[str, Any]:
    assert choice.finished is not None
    counts = choice.finished.counts
    found: dict[str, Any] = {
        "generated_text": choice.text,
        "finish_reason": choice.finished.reason,
        "prompt_tokens": counts.prompt_tokens,
        "new_tokens": counts.new_tokens,
        "seconds": choice.finished.seconds,
        "gate": served.gate,
    } | summary([choice])
    if details:
        found["tokens"] = [
            {"text": served.prompts.decode_one(t.token), "token": t.token, "skipped": t.skipped,
             "exit_layer": t.exit_layer, "entropy": t.entropy, "logprob": t.logprob}
            for t in choice.tokens
        ]  # fmt: skip
    return found
