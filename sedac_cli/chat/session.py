"""A conversation: its history, its gate, and what every reply really skipped. Knows nothing of terminals.

session = Session(loaded, "always:14"); turn = session.reply("The sea was", on_piece=lambda piece, token, turn: None)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sedac_cli.errors import InputError, UsageError, did_you_mean
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.generate import chat_text
from sedac_cli.runtime.plan import make_plan
from sedac_cli.runtime.stream import Row, RowCounts, StreamToken, context_limit, stream
from sedac_cli.runtime.text import TextStream


@dataclass(frozen=True)
class Params:
    """What /params shows and sets."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {"max_new_tokens": (1, None), "temperature": (0, 10), "top_p": (0.01, 1), "top_k": (0, None),
                  "seed": (0, 2**62)}  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not value >= low or (high is not None and not value <= high):
                allowed = f">= {low}" if high is None else f"between {low} and {high}"
                raise UsageError(f"{name} is {value}: it is {allowed}")

    def changed(self, words: list[str]) -> Params:
        """`["temperature=0.5", "top_k=40"]` -> the same with those changed."""
        kinds = {f.name: int if f.type == "int" else float for f in fields(self)}
        values: dict[str, Any] = {}
        for word in words:
            name, sign, text = word.partition("=")
            if name not in kinds:
                raise UsageError(f"there is no parameter '{name}'.{did_you_mean(name, list(kinds))}",
                                 hint="parameters: " + ", ".join(kinds))  # fmt: skip
            try:
                values[name] = kinds[name](text)
            except ValueError:
                raise UsageError(f"{name}: '{text}' is not a number" if sign else f"{name} has no value",
                                 hint=f"/params {name}={getattr(self, name)}") from None  # fmt: skip
        return replace(self, **values)


@dataclass
class Turn:
    """One question and its answer."""

    question: str
    gate: str
    num_layers: int
    text: str = ""
    tokens: list[StreamToken] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    counts: RowCounts | None = None
    seconds: float = 0.0
    first: float = 0.0
    """Seconds until the first token."""
    interrupted: bool = False
    dropped: int = 0
    """Earlier turns that no longer fit into the context."""

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the prompt's pass is left out."""
        later = len(self.tokens) - 1
        return later / (self.seconds - self.first) if later > 0 and self.seconds > self.first else 0.0

    @property
    def skip_ratio(self) -> float:
        return self.counts.skip_ratio if self.counts else 0.0

    def as_document(self) -> dict[str, Any]:
        return {
            "question": self.question, "text": self.text, "gate": self.gate, "interrupted": self.interrupted,
            "prompt_tokens": self.counts.prompt_tokens if self.counts else 0, "new_tokens": len(self.tokens),
            "tokens_per_second": self.tokens_per_second, "skip_ratio": self.skip_ratio, "dropped_turns": self.dropped,
            "tokens": [
                {"token": t.token, "skipped": t.skipped, "exit_layer": t.exit_layer, "entropy": t.entropy,
                 "logprob": t.logprob}
                for t in self.tokens
            ],
        }  # fmt: skip


OnPiece = Callable[[str, StreamToken, Turn], None]


class Session:
    """`template`: talk through the model's chat template; else what is typed is continued as plain text."""

    def __init__(
        self, loaded: LoadedModel, gate: str, params: Params | None = None, system: str | None = None,
        template: bool | None = None,
    ):  # fmt: skip
        has = bool(getattr(loaded.tokenizer, "chat_template", None))
        if template and not has:
            raise InputError(f"{loaded.identity.ref} has no chat template", hint="--no-template continues plain text")
        self.template = has if template is None else template
        if system and not self.template:
            raise UsageError("--system goes with a chat template; this conversation has none")
        self.loaded, self.params, self.system = loaded, params or Params(), system
        self.turns: list[Turn] = []
        self.forgotten = 0
        self.dense = False
        self.set_gate(gate)

    def set_gate(self, spec: str) -> None:
        """Another gate from the next reply on; a spec that makes no sense changes nothing."""
        plan = make_plan(spec, self.loaded.decoder, self.loaded.identity, seed=self.params.seed)
        self.gate, self.plan, self.dense = spec, plan, False

    @property
    def shown_gate(self) -> str:
        return "never (dense)" if self.dense else self.gate

    def clear(self) -> None:
        """Forget what was said; statistics stay."""
        self.forgotten = len(self.turns)

    def reply(self, question: str, on_piece: OnPiece) -> Turn:
        """Answer, telling every token as it comes. Ctrl-C ends the answer, not the conversation."""
        turn = Turn(question, self.shown_gate, self.loaded.decoder.num_layers)
        prompt, turn.dropped = self._prompt(question)
        limit = context_limit(self.loaded)
        room = self.params.max_new_tokens if limit is None else min(self.params.max_new_tokens, limit - len(prompt))
        row = Row(
            tuple(prompt), room, self.params.temperature, self.params.top_p, self.params.top_k,
            self.params.seed + len(self.turns),
        )  # fmt: skip
        text = TextStream(self.loaded.tokenizer)
        began = time.perf_counter()

        def hear(token: StreamToken) -> bool:
            turn.seconds = time.perf_counter() - began
            turn.first = turn.first or turn.seconds
            piece = text.push(token.token)
            if token.finish is not None:
                piece += text.finish()
            turn.tokens.append(token)
            turn.pieces.append(piece)
            turn.text += piece
            on_piece(piece, token, turn)
            return True

        def read(index: int, counts: RowCounts) -> None:
            turn.counts = counts

        plan = make_plan("never", self.loaded.decoder) if self.dense else self.plan
        try:
            stream(self.loaded, plan, [row], hear, read)
        except KeyboardInterrupt:
            turn.interrupted = True
            rest = text.finish()
            turn.text += rest
            if turn.pieces:
                turn.pieces[-1] += rest
        self.turns.append(turn)
        return turn

    def _prompt(self, question: str) -> tuple[list[int], int]:
        """Token ids of the conversation so far, and how many of its turns had to be left out to leave room."""
        limit = context_limit(self.loaded)
        remembered = self.turns[self.forgotten :]
        for dropped in range(len(remembered) + 1):
            ids = self._ids(remembered[dropped:], question)
            if limit is None or len(ids) + min(self.params.max_new_tokens, limit // 4) <= limit:
                return ids, dropped
        if limit is not None and len(ids) < limit:
            return ids, len(remembered)
        raise InputError(f"that is {len(ids)} tokens; the model has {limit} positions", hint="say less at once")

    def _ids(self, turns: list[Turn], question: str) -> list[int]:
        tokenizer = self.loaded.tokenizer
        if not self.template:
            words = "".join(turn.question + turn.text for turn in turns) + question
            return list(tokenizer(words, verbose=False)["input_ids"])
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.text}]
        text = chat_text(self.loaded, [*messages, {"role": "user", "content": question}])
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def stats(self) -> dict[str, Any]:
        """Over all replies, cleared ones too."""
        counts = [t.counts for t in self.turns if t.counts]
        tokens = [t for turn in self.turns for t in turn.tokens]
        seconds = sum(t.seconds - t.first for t in self.turns)
        later = sum(max(0, len(t.tokens) - 1) for t in self.turns)
        layers = self.loaded.decoder.num_layers
        processed = sum(sum(c.processed.values()) for c in counts)
        exits = [0] * layers
        for token in tokens:
            if token.exit_layer < layers:
                exits[token.exit_layer] += 1
        return {
            "replies": len(self.turns), "tokens": len(tokens),
            "tokens_per_second": later / seconds if seconds > 0 else 0.0,
            "skip_ratio": sum(c.skipped for c in counts) / max(1, processed * layers),
            "average_exit_layer": sum(t.exit_layer for t in tokens) / len(tokens) if tokens else float(layers),
            "average_entropy_bits": sum(t.entropy for t in tokens) / len(tokens) if tokens else 0.0,
            "exits": exits, "num_layers": layers,
        }  # fmt: skip
