"""Positions and padding, from every form a mask comes in."""

from __future__ import annotations

import pytest
import torch

from sedac_cli.runtime.positions import positions

PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
EXPECTED = [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
CPU = torch.device("cpu")


def attention(padding, width=None, window=None):
    """[B, 1, T, K] boolean: causal, without the padding, within the window; K may reach beyond T."""
    B, T = padding.shape
    width = width or T
    row, column = torch.arange(T).view(T, 1), torch.arange(width).view(1, width)
    allowed = (column <= row) & (column > row - (window or width))
    seen = torch.cat([padding, torch.zeros(B, width - T, dtype=padding.dtype)], 1).bool()
    return (allowed & seen.view(B, 1, width)).unsqueeze(1)


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


MASKS = {
    "2d": PADDED,
    "2d boolean": PADDED.bool(),
    "2d of a static cache": torch.cat([PADDED, torch.zeros(2, 4, dtype=torch.long)], 1),
    "4d boolean": attention(PADDED),
    "4d additive": additive(attention(PADDED)),
    "4d of a static cache": attention(PADDED, width=10),
    "one per kind of attention": {
        "sliding_attention": attention(PADDED, window=2),
        "full_attention": attention(PADDED),
    },
}


@pytest.mark.parametrize("form", MASKS)
def test_every_form_says_the_same(form):
    position, real = positions((2, 6), MASKS[form], None, 0, CPU)
    assert real.view(2, 6).tolist() == PADDED.bool().tolist()
    assert position.view(2, 6)[PADDED.bool()].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("form", [f for f in MASKS if not f.startswith("one")])
@pytest.mark.parametrize("past", [2, 4, 5])
def test_a_later_chunk_goes_on_where_the_cache_ends(form, past):
    mask = MASKS[form]
    if mask.dim() == 4:
        mask = mask[:, :, past:]
    position, real = positions((2, 6 - past), mask, None, past, CPU)
    assert position.view(2, -1).tolist() == [row[past:] for row in EXPECTED]
    assert real.view(2, -1).tolist() == PADDED[:, past:].bool().tolist()


@pytest.mark.parametrize("mask", [None, {"full_attention": None, "sliding_attention": None}, "a block mask"])
def test_without_a_readable_mask_all_are_tokens(mask):
    position, real = positions((2, 3), mask, None, 4, CPU)
    assert position.tolist() == [4, 5, 6] * 2
    assert real.all()


def test_a_mask_of_the_chunk_alone():
    position, real = positions((1, 3), torch.tensor([[1, 1, 0]]), None, 5, CPU)
    assert position.tolist()[:2] == [5, 6]
    assert real.tolist() == [True, True, False]


def test_packed_sequences_start_anew():
    ids = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert positions((1, 6), None, ids, 0, CPU)[0].tolist() == [0, 1, 2, 0, 1, 2]
    assert positions((1, 6), torch.ones(1, 6), ids, 0, CPU)[0].tolist() == [0, 1, 2, 0, 1, 2]
    block = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).tril().bool().view(1, 1, 6, 6)
    assert positions((1, 6), block, None, 0, CPU)[0].tolist() == [0, 1, 2, 0, 1, 2]


def test_position_ids_that_ignore_padding_do_not_hide_it():
    position, _ = positions((2, 6), PADDED, torch.arange(6).unsqueeze(0), 0, CPU)
    assert position.view(2, 6).tolist() == EXPECTED


def test_one_mask_for_the_whole_batch():
    position, real = positions((2, 6), attention(PADDED[1:]), None, 0, CPU)
    assert position.view(2, 6).tolist() == [EXPECTED[1]] * 2
    assert real.all()
