"""`sedac chat` as a person meets it: in a pseudo-terminal, typed into; and as a script meets it: through pipes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest
from conftest import ROOT

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x01|\x02|\r")


class Terminal:
    def __init__(self, *arguments, columns=100, rows=30, **env):
        self.master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        environment |= {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TERM": "xterm-256color",
        } | env
        command = [sys.executable, "-m", "sedac_cli", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
                                        preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0))  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, what: str, seconds: float = 120) -> str:
        """Everything new up to and with `what`."""
        end = time.monotonic() + seconds
        start = getattr(self, "mark", 0)
        while what not in ESCAPES.sub("", self.seen[start:]):
            assert time.monotonic() < end, ESCAPES.sub("", self.seen)[-3000:]
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    break
        self.mark = len(self.seen)
        return self.seen[start:]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> int:
        code = self.process.wait(30)
        os.close(self.master)
        return code


@pytest.fixture
def terminal(chatty_folder, request):
    started = []

    def start(*arguments, **more):
        base = ["--model", chatty_folder, "--gate", "always:2", "--temperature", 0]
        started.append(Terminal(*base, *arguments, **more))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_a_typed_session(terminal):
    t = terminal("--max-new-tokens", 24)
    t.until("you> ")
    t.type("the sea\n")
    shown = t.until("you> ")
    plain = ESCAPES.sub("", shown)
    assert "24 tokens" in plain
    assert "MLPs skipped 50.0%" in plain  # all tokens, two of four layers
    for word in ("always:2", "tokens/s", "entropy", "confidence", "left at layer 2", "2 of 4", "exits by layer"):
        assert word in plain
    assert "38;5;184m" in shown  # yellow3: half of the MLPs

    t.type("/dense\n")
    assert "gate never (dense)" in ESCAPES.sub("", t.until("you> "))
    t.type("the sea\n")
    shown = t.until("you> ")
    assert "MLPs skipped 0.0%" in ESCAPES.sub("", shown)
    assert "ran to the end" in ESCAPES.sub("", shown)
    final = shown[shown.rindex("24 tokens") - 4000 :]
    assert "38;5;39m" in final  # deep_sky_blue1: none
    t.type("/stats\n")
    assert "2 replies, 48 tokens" in ESCAPES.sub("", t.until("you> "))
    t.type("\x04")
    assert t.close() == 0


def test_what_is_typed_ahead_waits_for_the_prompt(terminal):
    t = terminal("--max-new-tokens", 1500)
    t.until("you> ")
    t.type("the sea\n")
    t.until("left at layer")
    t.type("/stats\n")
    drawing = ESCAPES.sub("", t.until("1500 tokens,")).partition("1500 tokens,")[0]
    assert "/stats" not in drawing  # typed keys would stand in it and move it
    if "1 replies" not in ESCAPES.sub("", t.seen):
        t.until("1 replies")


def test_a_window_that_changes_in_mid_reply(terminal):
    t = terminal("--max-new-tokens", 1500, columns=100, rows=30)
    t.until("you> ")
    t.type("the sea\n")
    t.until("left at layer")
    ioctl(t.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    shown = t.until("you> ")
    assert "\x1b[2J" in shown  # drawn anew, on a clean screen
    last = ESCAPES.sub("", shown[shown.rindex("\x1b[2J") :])
    assert "exits by layer" not in last  # no panel in a narrow window
    assert "1500 tokens" in last


def interrupt_at_the_prompt(t) -> None:
    """A Ctrl-C that comes after the prompt is drawn and before Python waits for keys is heard with the next key only."""
    for seconds in (10, 10, 10, 60):
        t.type("\x03")
        with contextlib.suppress(AssertionError):
            t.until("Ctrl-D or /quit leaves\n\nyou> ", seconds)
            return
    raise AssertionError(t.seen[-3000:])


def test_ctrl_c_stops_a_reply_then_the_session_goes_on(terminal):
    t = terminal("--max-new-tokens", 3000)
    t.until("you> ")
    t.type("the sea\n")
    t.until("left at layer")
    t.type("\x03")
    assert "interrupted" in ESCAPES.sub("", t.until("you> "))
    interrupt_at_the_prompt(t)
    t.type("/params max_new_tokens=2\n")
    t.until("you> ")
    t.type("x\n")
    assert "2 tokens" in ESCAPES.sub("", t.until("you> "))
    t.type("/quit\n")
    assert t.close() == 0


def test_a_narrow_terminal_has_the_figures_under_the_reply(terminal):
    t = terminal("--max-new-tokens", 60, columns=50, rows=14)
    t.until("you> ")
    t.type("the sea\n")
    plain = ESCAPES.sub("", t.until("you> "))
    assert "60 tokens" in plain
    assert "╭" not in plain
    t.type("\x04")
    assert t.close() == 0


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_none_is_wanted(terminal, env):
    t = terminal("--max-new-tokens", 12, **env)
    t.until("> ")
    t.type("the sea\n")
    shown = t.until("12 tokens")
    assert "\x1b" not in shown
    t.type("/quit\n")
    assert t.close() == 0


def chat(*arguments, typed: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sedac_cli", "chat", *map(str, arguments)]
    return subprocess.run(command, input=typed.encode(), capture_output=True, env=environment, timeout=120)


def test_through_pipes_stdout_is_the_text_alone(chatty_folder, chatty):
    from sedac_cli.chat.session import Params, Session

    found = chat("--model", chatty_folder, "--gate", "always:2", "--temperature", 0, "--max-new-tokens", 15,
                 typed="the sea\n/stats\nan old king\n")  # fmt: skip
    assert found.returncode == 0, found.stderr.decode()
    session = Session(chatty, "always:2", Params(15, 0.0))
    wanted = [session.reply(q, lambda *_: None).text for q in ("the sea", "an old king")]
    assert not any(ord(c) < 32 and c not in "\n\t" for c in found.stdout.decode())
    assert found.stdout.decode().replace("�", "") == "".join(
        "".join(c for c in text if c == "\n" or c == "\t" or 32 <= ord(c) < 127 or ord(c) >= 160).replace("�", "")
        + "\n"
        for text in wanted
    )
    assert b"1 replies, 15 tokens" in found.stderr


def test_json_is_one_document(chatty_folder):
    found = chat("--model", chatty_folder, "--gate", "always:2", "--temperature", 0, "--max-new-tokens", 5, "--json",
                 typed="the sea\n/quit\n")  # fmt: skip
    document = json.loads(found.stdout)
    assert [t["skipped"] for t in document["turns"][0]["tokens"]] == [2] * 5
    assert document["stats"]["skip_ratio"] == 0.5


def test_terminated_at_the_prompt(terminal):
    t = terminal()
    t.until("you> ")
    t.process.send_signal(signal.SIGTERM)
    assert t.process.wait(20) != 0
