"""What the screen draws, without a terminal: the model's output cannot steer it, and the panel says what the tokens say."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sedac_cli.chat.screen import PANEL, LiveScreen, exits_line, spark
from sedac_cli.chat.session import Turn
from sedac_cli.palette import STEPS, legend, style_of
from sedac_cli.runtime.stream import RowCounts, StreamToken


def drawn(turn, whole, width=90, height=20):
    console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, color_system="256", highlight=False
    )
    screen = LiveScreen(console)
    screen.turn, screen.gate = turn, turn.gate
    console.print(screen.frame(whole))
    return console.file.getvalue()


def turn_of(pieces, skipped):
    tokens = [StreamToken(0, 5, s, 28 - s, 2.5, -0.5) for s in skipped]
    counts = RowCounts(28, 3, len(tokens), {"prefill": 3, "decode": len(tokens)}, sum(skipped))
    return Turn("q", "always:14", 28, "".join(pieces), tokens, list(pieces), counts, seconds=2.0, first=1.0)


def test_output_cannot_steer_the_terminal():
    shown = drawn(turn_of(["a\x1b[2J\x1b]0;title\x07", "b\x9b31m\r", "[red]c"], [0, 14, 28]), whole=True)
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
    assert "\x9b" not in shown
    assert "[red]c" in shown


def test_while_it_grows_the_end_is_shown_and_at_last_everything():
    pieces = [f"word{i}\n" for i in range(200)]
    turn = turn_of(pieces, [7] * 200)
    growing = drawn(turn, whole=False)
    assert "word199" in growing
    assert "word10\x1b" not in growing
    assert growing.count("\n") <= 20
    whole = drawn(turn, whole=True)
    assert all(f"word{i}" in whole for i in range(200))


def test_the_panel_says_what_the_tokens_say():
    shown = drawn(turn_of(["a", "b", "c"], [0, 14, 28]), whole=True)
    for words in ("always:14", "2.50 bits", "60.7%", "left at layer 0", "28 of 28", "2.0"):
        assert words in shown


@pytest.mark.parametrize("layers", [1, 4, 28, 80, 126])
def test_exits_fit_the_panel(layers):
    turn = Turn("q", "g", layers)
    assert exits_line(turn) == "none"
    turn.tokens = [StreamToken(0, 1, 1, layers - 1, 1.0, -1.0)]
    assert len(exits_line(turn)) <= PANEL - 4
    assert exits_line(turn).rstrip().endswith("█")


def test_colours():
    assert [style_of(s, 28) for s in (0, 5, 6, 14, 27, 28)] == [
        STEPS[0],
        STEPS[0],
        STEPS[1],
        STEPS[2],
        STEPS[4],
        STEPS[4],
    ]
    assert [label for label, _ in legend()] == ["0-20 %", "20-40 %", "40-60 %", "60-80 %", "80-100 %"]
    assert spark([0, 0.5, 1, 2, -1]) == " ▄██ "


def test_a_narrow_reply_that_is_kept_has_no_figures_of_its_own():
    """`end` prints them after it."""
    turn = turn_of(["the ", "sea"], [0, 14])
    assert "tokens/s" in drawn(turn, whole=False, width=50)
    assert "tokens/s" not in drawn(turn, whole=True, width=50)


def test_empty_lines_at_the_end_are_not_drawn():
    assert drawn(turn_of(["the sea", *["\n"] * 300], [0] * 301), whole=True, width=50).count("\n") < 3
    assert drawn(turn_of(["the", "\n\n", "sea"], [0] * 3), whole=True, width=50).count("\n") == 3
