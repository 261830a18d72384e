"""What clients may send, checked before anything runs; a field nobody knows, or that would change the answer and is not
supported, is refused by name.

CompletionRequest.model_validate({"model": "tiny", "prompt": "The sea was", "max_tokens": 5})
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sedac_cli.runtime.stream import Row

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = str | Annotated[list[str], Field(max_length=16)]
Temperature = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SedacOptions(Closed):
    """Our own field: `{"sedac": {"dense": true}}` runs every MLP for this request."""

    dense: bool = False


class StreamOptions(Closed):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Sampling(Closed):
    """What every endpoint takes."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    ignore_eos: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(s for s in found if s)

    def row(
        self,
        prompt: tuple[int, ...],
        max_new_tokens: int,
        choice: int,
        *,
        dense: bool,
        temperature: float,
        logprobs: int,
    ) -> Row:
        """`temperature` is the endpoint's default. Without a seed every choice is drawn afresh."""
        return Row(
            prompt,
            max_new_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            seed=secrets.randbits(62) if self.seed is None else (self.seed + choice) % 2**63,
            ignore_eos=self.ignore_eos,
            dense=dense,
            top_logprobs=logprobs,
        )


IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields of OpenAI's that say nothing about the text."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "functions": ([],), "function_call": ("none", "auto"), "reasoning_effort": ("none",),
}  # fmt: skip
"""Fields of OpenAI's that are not supported: only the values that change nothing are taken."""


class OpenAIRequest(Sampling):
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    sedac: SedacOptions = SedacOptions()

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, harmless in NEUTRAL.items():
            if given.get(name) is not None and given[name] not in harmless:
                raise ValueError(f"'{name}' is not supported")
        return {k: v for k, v in given.items() if k not in IGNORED and k not in NEUTRAL}

    @property
    def choices(self) -> int:
        return self.n or 1


class CompletionRequest(OpenAIRequest):
    prompt: Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Closed):
    type: Literal["text"]
    text: str


class Message(Closed):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(OpenAIRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' goes with 'logprobs': true")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class GenerateRequest(Sampling):
    """The toolkit's own, simpler form. Greedy unless a temperature is given."""

    prompt: Text
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    chat: bool = False
    dense: bool = False
    details: bool = False


class BatchGenerateRequest(Sampling):
    prompts: Annotated[list[Text], Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    chat: bool = False
    dense: bool = False
    details: bool = False
