"""Pieces of text as tokens come: never a broken character, never text of a stop string, and together the whole."""

from __future__ import annotations

import random

import pytest
from conftest import tiny_tokenizer

from sedac_cli.runtime.text import TextStream

TOKENIZER = tiny_tokenizer()


def feed(text, stop=()):
    stream = TextStream(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER(text)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return stream, [*pieces, stream.finish()]


@pytest.mark.parametrize("text", ["the sea", "žluťoučký kůň", "海は灰色だった 🐚🌊!", "a\n\n  b", ""])
def test_pieces_join_to_the_text_and_hold_no_broken_character(text):
    _, pieces = feed(text)
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_certain():
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in TOKENIZER("a🌊b")["input_ids"]]
    assert pieces == ["a", "", "", "", "🌊", "b"]


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_text_join_to_what_decode_says(seed):
    rng = random.Random(seed)
    ids = [rng.randrange(2, 258) for _ in range(300)]
    stream = TextStream(TOKENIZER)
    joined = "".join(stream.push(i) for i in ids) + stream.finish()
    assert joined == TOKENIZER.decode(ids)


def test_bytes_that_never_become_text_are_given_out_at_last():
    ids = TOKENIZER("é")["input_ids"][:1] * 200  # a first byte without its second
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(i) for i in ids]
    assert len("".join(pieces)) > 190
    assert len(stream.ids) - stream.prefix <= 2 * 66


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two. three", ["two"], "one. "),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("aab", ["ab"], "a"),
        ("abc", ["bcd", "c"], "ab"),
        ("xyz", ["z", "y"], "x"),
        ("nothing ab", ["abc"], "nothing ab"),
        ("🌊🐚", ["🐚"], "🌊"),
        ("text", [""], "text"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(text, stop, expected):
    stream, pieces = feed(text, stop)
    assert "".join(pieces) == expected
    assert stream.stopped == (expected != text)
    assert stream.finish() == ""


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(TOKENIZER, ["END"])
    pieces = [stream.push(token) for token in TOKENIZER("xENENDy")["input_ids"]]
    assert pieces[:6] == ["x", "", "", "EN", "", ""]
    assert stream.stopped
