"""Read, answer, obey: the loop of `sedac chat`, and its commands.

talk(session, screen)
"""

from __future__ import annotations

import shlex
from dataclasses import asdict

from sedac_cli.chat.screen import Screen
from sedac_cli.chat.session import Session
from sedac_cli.errors import SedacError, did_you_mean

HELP = {
    "/help": "this list",
    "/quit": "leave (also Ctrl-D)",
    "/stats": "what was skipped, how fast, in all replies",
    "/clear": "forget the conversation",
    "/params": "show, or set: /params temperature=0.5 max_new_tokens=64",
    "/gate": "show, or take another: /gate always:14",
    "/dense": "run every MLP; the same again takes the gate back",
}


def talk(session: Session, screen: Screen) -> None:
    """Until /quit or the end of the input. Ctrl-C ends a reply; at the prompt it only says how to leave."""
    while True:
        try:
            line = screen.ask()
        except EOFError:
            return
        except KeyboardInterrupt:
            screen.say("\nCtrl-D or /quit leaves")
            continue
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if obey(line, session, screen):
                    return
            else:
                answer(line, session, screen)
        except SedacError as error:
            screen.say(f"error: {error.message}" + (f"\n  try: {error.hint}" if error.hint else ""))


def answer(line: str, session: Session, screen: Screen) -> None:
    turn = None
    screen.begin(session.shown_gate)
    try:
        turn = session.reply(line, screen.piece)
    finally:
        screen.end(turn)
    if turn.dropped:
        screen.say(f"the oldest {turn.dropped} of the earlier turns no longer fit and were left out")


def obey(line: str, session: Session, screen: Screen) -> bool:
    """Carry out a command; True ends the conversation."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit", "/q"):
        return True
    if name == "/help":
        screen.say("\n".join(f"{command:9} {meaning}" for command, meaning in HELP.items()))
    elif name == "/clear":
        session.clear()
        screen.say("forgotten")
    elif name == "/stats":
        screen.say(describe(session))
    elif name == "/params":
        if rest:
            session.params = session.params.changed(words(rest))
        screen.say(", ".join(f"{key}={value}" for key, value in asdict(session.params).items()))
    elif name == "/gate":
        if rest:
            session.set_gate(rest)
        screen.say(f"gate {session.shown_gate}")
    elif name == "/dense":
        session.dense = not session.dense
        screen.say(f"gate {session.shown_gate}")
    else:
        screen.say(f"there is no command {name}.{did_you_mean(name, list(HELP))} /help lists them")
    return False


def words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def describe(session: Session) -> str:
    s = session.stats()
    exits = ", ".join(f"{layer}: {count}" for layer, count in enumerate(s["exits"]) if count) or "none"
    return (
        f"{s['replies']} replies, {s['tokens']} tokens, {s['tokens_per_second']:.1f} tokens/s\n"
        f"MLPs skipped {s['skip_ratio']:.1%}, average exit layer {s['average_exit_layer']:.1f} of {s['num_layers']}, "
        f"average entropy {s['average_entropy_bits']:.2f} bits\n"
        f"tokens by the layer they left at: {exits}"
    )
