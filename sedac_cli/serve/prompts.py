"""From what a client wrote to rows that can run: tokenizing off the event loop, and every bound checked before queueing.

prompts = Prompts(loaded, Limits()); ids = await prompts.encode("The sea was")
"""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.generate import chat_text
from sedac_cli.runtime.stream import context_limit
from sedac_cli.serve.errors import ApiError
from sedac_cli.serve.limits import Limits


class Prompts:
    def __init__(self, loaded: LoadedModel, limits: Limits, context: int | None = None):
        """`context`: positions of the engine, where these are fewer than the model's."""
        self.loaded, self.limits = loaded, limits
        self.context = min((n for n in (context, context_limit(loaded)) if n is not None), default=None)
        # A fast tokenizer must not encode and decode in two threads at once: the engine has the other one.
        self.tokenizer: Any = copy.deepcopy(loaded.tokenizer)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="sedac-tokenizer")

    async def encode(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await self._in_pool(self._ids, prompt, True)
        size = self.loaded.decoder.vocab_size
        wrong = next((token for token in prompt if token >= size), None)
        if wrong is not None:
            raise ApiError(400, f"token id {wrong} does not exist: the vocabulary has {size}", param="prompt")
        return tuple(prompt)

    async def encode_chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return await self._in_pool(self._chat_ids, messages)

    async def _in_pool(self, work: Any, *args: Any) -> tuple[int, ...]:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *args)

    def _ids(self, text: str, special: bool) -> tuple[int, ...]:
        try:
            return tuple(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        except (UnicodeEncodeError, TypeError):  # half of a surrogate pair, which JSON can carry
            raise ApiError(400, "the prompt holds a character that is no valid Unicode", param="prompt") from None

    def _chat_ids(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        from jinja2 import TemplateError

        try:
            text = chat_text(self.loaded, messages, self.tokenizer)
        except InputError as error:
            raise ApiError(400, f"{error.message}: use /v1/completions", code="no_chat_template") from None
        except TemplateError as error:
            raise ApiError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        return self._ids(text, False)

    def new_tokens(self, prompt: tuple[int, ...], asked: int | None, default: int, param: str) -> int:
        """How many tokens a row may make. What was asked for is granted or refused, never cut silently; what was not
        asked for is as much as fits."""
        most = self.limits.max_new_tokens
        if asked is not None and asked > most:
            raise ApiError(400, f"{param} is {asked}; this server gives at most {most}", param=param)
        if not prompt:
            raise ApiError(400, "a prompt without a single token: there is nothing to continue", param="prompt")
        room = most if self.context is None else self.context - len(prompt)
        if room < (asked or 1):
            raise ApiError(
                400, f"the prompt has {len(prompt)} tokens and {asked or 1} more were asked for; this server has "
                f"{self.context} positions", param=param if room >= 1 else "prompt", code="context_length_exceeded",
            )  # fmt: skip
        return min(default, room, most) if asked is None else asked

    def decode_one(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
