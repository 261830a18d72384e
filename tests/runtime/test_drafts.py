"""Drafts copied from the text, and how many drafts are worth making."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sedac_cli.runtime.drafts import RETRY, DraftLength, NgramLookup


def test_the_longest_match_wins_and_of_equals_the_latest():
    text = [1, 2, 3, 7, 9, 2, 3, 8, 9, 2, 3, 5, 1, 2, 3]
    assert NgramLookup(3, 2).propose(text, 3) == [7, 9, 2]
    assert NgramLookup(2, 2).propose(text, 3) == [5, 1, 2]
    assert NgramLookup(3, 2).propose(text, 1) == [7]


def test_no_match_is_no_draft():
    assert NgramLookup(4, 2).propose([1, 2, 3, 4], 3) == []
    assert NgramLookup(4, 2).propose([1, 5, 2, 5], 3) == []
    assert NgramLookup(4, 1).propose([7], 3) == []
    assert NgramLookup(4, 1).propose([7, 7], 0) == []


def test_a_repeating_text_may_overlap_itself():
    assert NgramLookup(4, 2).propose([5, 5, 5, 5], 3) == [5]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 5))
def test_a_draft_is_what_followed_the_longest_run_found_by_brute_force(text, longest, count):
    expected = []
    for length in range(min(longest, len(text) - 1), 0, -1):
        starts = [i for i in range(len(text) - length) if text[i : i + length] == text[-length:]]
        if starts:
            expected = text[starts[-1] + length :][:count]
            break
    assert NgramLookup(longest, 1).propose(text, count) == expected


def test_length_follows_acceptance():
    length = DraftLength(8, adaptive=True, cost=0.5)
    for _ in range(60):
        length.learn(8, 8)
    assert length.choose() == 8
    for _ in range(60):
        length.learn(0, 4)
    assert [length.choose() for _ in range(RETRY)] == [0] * (RETRY - 1) + [1]


def test_only_drafts_up_to_the_first_refusal_are_judged():
    length = DraftLength(4, adaptive=True, cost=0.5)
    for _ in range(200):
        length.learn(1, 4)  # one stood, one fell, two were never looked at
    assert abs(length.acceptance - 0.5) < 0.02


def test_a_dear_draft_that_is_often_refused_is_not_made_and_a_fixed_length_stays():
    assert DraftLength(4, adaptive=True, cost=1.0).choose() == 0
    assert DraftLength(4, adaptive=True, cost=0.0).choose() == 4
    assert DraftLength(4, adaptive=False, cost=1.0).choose() == 4
