"""A conversation without a terminal: history, gates, parameters, and replies that are what `generate` gives."""

from __future__ import annotations

import pytest

from sedac_cli.chat.loop import obey, talk
from sedac_cli.chat.session import Params, Session
from sedac_cli.errors import InputError, UsageError
from sedac_cli.runtime.generate import GenerateOptions, generate
from sedac_cli.runtime.plan import make_plan

GREEDY = Params(max_new_tokens=20, temperature=0)


def ignore(piece, token, turn):
    pass


class Script:
    """A screen that types what it is given and keeps what it is shown."""

    def __init__(self, *lines):
        self.lines, self.said, self.pieces, self.gates = list(lines), [], [], []

    def ask(self):
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def begin(self, gate):
        self.gates.append(gate)

    def piece(self, piece, token, turn):
        self.pieces.append((piece, token.skipped))

    def end(self, turn):
        pass

    def say(self, text):
        self.said.append(text)


def test_a_reply_is_what_generate_gives(chatty):
    turn = Session(chatty, "always:2", GREEDY).reply("the sea", ignore)
    plan = make_plan("always:2", chatty.decoder)
    result = generate(chatty, plan.gate, ["the sea"], GenerateOptions(20, chat=True))
    assert turn.text == result.texts[0]
    assert [(t.token, t.skipped, t.exit_layer) for t in turn.tokens] == [
        (t.token, t.skipped, t.exit_layer) for t in result.tokens[0]
    ]
    assert turn.skip_ratio == pytest.approx(result.skip_ratio) == pytest.approx(0.5)
    assert "".join(turn.pieces) == turn.text


def test_the_model_is_told_what_was_said_before(chatty):
    session = Session(chatty, "never", GREEDY, system="be brief")
    first = session.reply("the sea", ignore)
    second = session.reply("and the king", ignore)
    wanted = f"<system>be brief\n<user>the sea\n<assistant>{first.text}\n<user>and the king\n<assistant>"
    assert second.counts.prompt_tokens == len(chatty.tokenizer(wanted)["input_ids"])
    session.clear()
    third = session.reply("the sea", ignore)
    assert third.text == first.text
    assert session.stats()["replies"] == 3


def test_plain_continuation(tiny, chatty):
    session = Session(tiny, "never", GREEDY)
    assert not session.template
    first = session.reply("the sea", ignore)
    second = session.reply(" and", ignore)
    assert second.counts.prompt_tokens == len(tiny.tokenizer("the sea" + first.text + " and")["input_ids"])
    assert not Session(chatty, "never", template=False).template
    with pytest.raises(InputError, match="no chat template"):
        Session(tiny, "never", template=True)
    with pytest.raises(UsageError, match="--system"):
        Session(tiny, "never", system="x")


def test_a_long_conversation_drops_its_oldest_turns(tiny):
    session = Session(tiny, "never", GREEDY)
    dropped = [session.reply("the sea was grey and the king ran", ignore).dropped for _ in range(6)]
    assert dropped[0] == 0
    assert dropped[-1] > 0
    assert all(len(t.tokens) == 20 or t.tokens[-1].finish == "stop" for t in session.turns)
    with pytest.raises(InputError, match="128 positions"):
        session.reply("x" * 300, ignore)
    assert len(session.turns) == 6


def test_gates_change_what_is_really_run(chatty):
    session = Session(chatty, "always:2", GREEDY)
    screen = Script(
        "the sea", "/dense", "the sea", "/dense", "the sea", "/gate always:1", "the sea", "/gate always:9", "the sea"
    )
    talk(session, screen)
    assert screen.gates == ["always:2", "never (dense)", "always:2", "always:1", "always:1"]
    assert [{t.skipped for t in turn.tokens} for turn in session.turns] == [{2}, {0}, {2}, {3}, {3}]
    assert "always:9: the model has layers 0..3" in screen.said[-1]
    stock = generate(chatty, make_plan("never", chatty.decoder).gate, ["the sea"], GenerateOptions(20, chat=True))
    session.clear()
    session.dense = True
    assert session.reply("the sea", ignore).text == stock.texts[0]


def test_parameters(chatty):
    session, screen = Session(chatty, "never", GREEDY), Script()
    obey("/params max_new_tokens=3 temperature=0.5", session, screen)
    assert (session.params.max_new_tokens, session.params.temperature) == (3, 0.5)
    assert "max_new_tokens=3" in screen.said[-1]
    assert len(session.reply("x", ignore).tokens) <= 3
    for wrong in ("temprature=1", "temperature=hot", "temperature", "top_p=2", "max_new_tokens=0", "temperature=nan"):
        with pytest.raises(UsageError):
            obey(f"/params {wrong}", session, screen)
    assert session.params.max_new_tokens == 3


def test_sampling_varies_by_turn_and_repeats_by_seed(chatty):
    def talk_twice():
        session = Session(chatty, "never", Params(max_new_tokens=12, temperature=1.5, seed=3), template=False)
        first = session.reply("the sea", ignore).text
        session.clear()
        return first, session.reply("the sea", ignore).text

    first, second = talk_twice()
    assert first != second
    assert talk_twice() == (first, second)


def test_ctrl_c_ends_the_reply_and_the_model_is_clean(chatty):
    session = Session(chatty, "always:2", Params(max_new_tokens=50, temperature=0))

    def stop(piece, token, turn):
        if len(turn.tokens) == 5:
            raise KeyboardInterrupt

    turn = session.reply("the sea", stop)
    assert turn.interrupted
    assert len(turn.tokens) == 5
    assert "".join(turn.pieces) == turn.text
    assert len(session.reply("the sea", ignore).tokens) > 5


def test_commands(chatty):
    session, screen = (
        Session(chatty, "always:2", GREEDY),
        Script("/help", "/stats", "x", "/stats", "/clera", "", "/quit", "never read"),
    )
    talk(session, screen)
    assert screen.lines == ["never read"]
    assert all(name in screen.said[0] for name in ("/quit", "/stats", "/clear", "/params", "/gate", "/dense", "/help"))
    assert screen.said[1].startswith("0 replies")
    assert "tokens by the layer they left at: 2: 20" in screen.said[2]
    assert "Did you mean '/clear'?" in screen.said[3]
