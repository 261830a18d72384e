"""What a conversation looks like: two screens with one face. `Plain` writes text as it comes; `Live` colours every token
by what was skipped for it and keeps a panel of figures beside the growing reply.

screen = make_screen(Output()); screen.begin(turn); screen.piece(piece, token, turn); screen.end(turn)
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from typing import Any, Protocol

from sedac_cli.chat.quiet import typing_unseen
from sedac_cli.chat.session import Turn
from sedac_cli.console import Output
from sedac_cli.palette import legend, style_of
from sedac_cli.runtime.stream import StreamToken

NARROW = 72
PANEL = 32
BARS = " ▁▂▃▄▅▆▇█"
CONTROL = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A model's output must not steer the terminal."""


class Screen(Protocol):
    def ask(self) -> str: ...
    def begin(self, turn_gate: str) -> None: ...
    def piece(self, piece: str, token: StreamToken, turn: Turn) -> None: ...
    def end(self, turn: Turn | None) -> None: ...
    def say(self, text: str) -> None: ...


def make_screen(out: Output) -> Screen:
    """Colours and a panel where there is a terminal that can show them and nobody asked for none."""
    fancy = (
        sys.stdin.isatty() and sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not out.json
        and os.environ.get("TERM", "") not in ("", "dumb")
    )  # fmt: skip
    return LiveScreen() if fancy else PlainScreen(out)


def summary(turn: Turn) -> str:
    layers = turn.num_layers
    exits = [t.exit_layer for t in turn.tokens]
    average = sum(exits) / len(exits) if exits else float(layers)
    return (
        f"{len(turn.tokens)} tokens, {turn.tokens_per_second:.1f} tokens/s, MLPs skipped {turn.skip_ratio:.1%}, "
        f"average exit layer {average:.1f} of {layers}, gate {turn.gate}"
        + (", interrupted" if turn.interrupted else "")
    )


class PlainScreen:
    """stdout is the conversation's text alone; figures go to stderr."""

    def __init__(self, out: Output):
        self.out = out
        self.tty = sys.stdin.isatty()

    def ask(self) -> str:
        if self.tty:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def begin(self, turn_gate: str) -> None:
        pass

    def piece(self, piece: str, token: StreamToken, turn: Turn) -> None:
        if not self.out.json:
            print(piece.translate(CONTROL), end="", flush=True)

    def end(self, turn: Turn | None) -> None:
        if not self.out.json:
            print(flush=True)
        if turn is not None:
            self.out.note(summary(turn))

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)


class LiveScreen:
    """Made for a terminal. The reply grows beside the panel; when it is done both stay in the scrollback."""

    def __init__(self, console: Any = None):
        from rich.console import Console

        self.console = console or Console(highlight=False)
        self.live: Any = None
        self.unseen = contextlib.ExitStack()
        self.size: Any = None
        self.turn: Turn | None = None
        self.gate = ""

    def ask(self) -> str:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() a line editor and its history
        self.console.print()
        return input("\x01\x1b[1m\x02you> \x01\x1b[0m\x02")

    def begin(self, turn_gate: str) -> None:
        self.turn, self.gate = None, turn_gate
        self.unseen.enter_context(typing_unseen())
        self._start()

    def _start(self) -> None:
        from rich.live import Live

        self.size = self.console.size
        self.live = Live(
            console=self.console, get_renderable=lambda: self.frame(whole=False), refresh_per_second=8,
            vertical_overflow="crop", transient=True,
        )  # fmt: skip
        self.live.start()

    def piece(self, piece: str, token: StreamToken, turn: Turn) -> None:
        self.turn = turn
        if self.live is not None and self.console.size != self.size:
            # The terminal has broken the lines anew: where the drawing began is not known any more.
            self.live.stop()
            self.console.clear()
            self._start()

    def end(self, turn: Turn | None) -> None:
        """The last frame may hold only the end of the reply: the whole is printed instead."""
        live, self.live = self.live, None
        if live is None:
            return
        self.turn = turn
        with self.unseen:  # until all is drawn
            live.stop()
            if turn is not None:
                self.console.print(self.frame(whole=True))
                self.console.print(summary(turn), style="dim")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, style="cyan")

    # What is drawn ----------------------------------------------------------------------------------------------

    def frame(self, whole: bool) -> Any:
        """The reply, or as much of its end as the window holds, and the panel; under it where the window is narrow."""
        from rich.console import Group
        from rich.table import Table

        wide = self.console.width >= NARROW
        width = self.console.width - (PANEL + 2 if wide else 0)
        reply = self.reply()
        if not whole:
            height = max(4, self.console.height - (3 if wide else 8))
            lines = reply.wrap(self.console, width)
            from rich.text import Text

            reply = Text("\n").join(lines[-height:])
        if not wide:  # what is kept has its figures printed after it
            return reply if whole else Group(reply, self.figures_line())
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=width, overflow="fold")
        grid.add_column(width=PANEL)
        grid.add_row(reply, self.panel())
        return grid

    def reply(self) -> Any:
        from rich.text import Text

        text = Text()
        turn = self.turn
        if turn is None:
            return Text("reading the prompt ...", style="dim")
        for piece, token in zip(turn.pieces, list(turn.tokens), strict=False):
            text.append(piece.translate(CONTROL), style=style_of(token.skipped, turn.num_layers))
        text.rstrip()  # models that do not know where to end write empty lines: a screen of nothing
        return text

    def figures_line(self) -> Any:
        from rich.text import Text

        return Text(summary(self.turn) if self.turn else f"gate {self.gate}", style="dim")

    def panel(self) -> Any:
        from rich.panel import Panel
        from rich.text import Text

        turn, lines = self.turn, [Text(short(self.gate), style="bold", overflow="ellipsis", no_wrap=True)]
        if turn is not None and turn.tokens:
            last = turn.tokens[-1]
            recent = turn.tokens[-(PANEL - 6) :]
            left = "ran to the end" if last.exit_layer >= turn.num_layers else f"left at layer {last.exit_layer}"
            highest = max(t.entropy for t in recent) or 1.0
            lines += [
                row("tokens", f"{len(turn.tokens)}"),
                row("tokens/s", f"{turn.tokens_per_second:.1f}"),
                row("MLPs skipped", f"{turn.skip_ratio:.1%}"),
                row("entropy", f"{last.entropy:.2f} bits"),
                Text(spark([t.entropy / highest for t in recent]), style="blue"),
                row("confidence", f"{math.exp(last.logprob):.1%}"),
                Text(spark([math.exp(t.logprob) for t in recent]), style="green"),
                row("last token", left),
                row("skipped", f"{last.skipped} of {turn.num_layers}"),
                Text("exits by layer", style="dim"),
                Text(exits_line(turn), style="yellow"),
            ]
        scale = Text()
        for label, style in legend():
            scale.append("█", style=style)
            scale.append(label.split("-")[0] + " ", style="dim")
        lines += [Text("colour: MLPs skipped, %", style="dim"), scale]
        return Panel(Text("\n").join(lines), width=PANEL, border_style="dim")


def short(gate: str) -> str:
    """A gate's spec without the folders of its file."""
    name, sign, argument = gate.partition(":")
    return f"{name}{sign}{argument.rpartition('/')[2]}"


def row(name: str, value: str) -> Any:
    from rich.text import Text

    inside = PANEL - 4
    return Text.assemble((name, "dim"), " " * max(1, inside - len(name) - len(value)), value)


def spark(values: list[float]) -> str:
    """0..1 as a row of bars."""
    return "".join(BARS[max(0, min(8, round(v * 8)))] for v in values)


def exits_line(turn: Turn) -> str:
    """How many tokens left at each layer, as bars over the layers."""
    counts = [0] * turn.num_layers
    for token in turn.tokens:
        if token.exit_layer < turn.num_layers:
            counts[token.exit_layer] += 1
    inside = PANEL - 4
    per = math.ceil(len(counts) / inside)
    merged = [sum(counts[i : i + per]) for i in range(0, len(counts), per)]
    most = max(merged) or 1
    bars = "".join(BARS[0] if not c else BARS[max(1, round(8 * c / most))] for c in merged)
    return bars if any(merged) else "none"
