"""Tokens to text as they come: a piece is given out as soon as nothing that follows can change it.

Always true: the pieces joined are the same whether they are shown one by one or at the end, a character is never cut in
its bytes, and no text from a stop string on is given out.

    text = TextStream(tokenizer, stop=["\n\n"])
    piece = text.push(token)        # "" while a character or a stop string may be unfinished
    text.finish()                   # what was held back
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "�"
MAX_PENDING = 64
"""Tokens after which bytes that never become a character are given up on."""


class TextStream:
    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = [s for s in stop if s]
        self.stopped = False
        self.ids: list[int] = []
        self.prefix, self.read, self.given = 0, 0, 0
        self.held = ""

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self._cut(self._decoded(last=False))

    def finish(self) -> str:
        """What was held back: unfinished bytes, and what might have become a stop string."""
        if self.stopped:
            return ""
        rest = self._cut(self._decoded(last=True))
        rest, self.held = rest + ("" if self.stopped else self.held), ""
        return rest

    def _decoded(self, last: bool) -> str:
        """New text that is certain. It is decoded together with the tokens before it: some begin with a space or not,
        depending on what they follow."""
        before = self._decode(self.ids[self.prefix : self.read])
        text = self._decode(self.ids[self.prefix :])[len(before) :]
        certain = text if last or not text.endswith(UNFINISHED) else text[: -len(UNFINISHED)]
        piece, self.given = certain[self.given :], max(self.given, len(certain))
        if certain == text or len(self.ids) - self.read > MAX_PENDING:
            piece += text[self.given :]
            self.prefix, self.read, self.given = self.read, len(self.ids), 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _cut(self, piece: str) -> str:
        if self.stopped or not self.stop:
            return "" if self.stopped else piece
        text = self.held + piece
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
