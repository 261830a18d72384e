"""How far a step's logits may be from the model's own: a limit for all, or what the model's own two ways differ by, up to a point."""

from __future__ import annotations

import pytest
import torch

from sedac_cli.runtime.graph.agreement import AGREE, MOST, Gap, own_step

OWN = torch.tensor([3.0, 4.0])
HALF = torch.bfloat16


def off(share):
    return OWN + torch.tensor([5.0 * share, 0.0])


@pytest.mark.parametrize(
    ("found", "again", "fits", "allowed"),
    [
        (0.04, None, True, AGREE[HALF]),
        (0.06, None, False, AGREE[HALF]),
        (0.06, 0.02, False, AGREE[HALF]),  # a model that rounds little gets no more for it
        (0.06, 0.04, True, 0.08),
        (0.3, 0.5, False, MOST * AGREE[HALF]),  # one whose own step is wrong is no measure
    ],
)
def test_what_is_allowed(found, again, fits, allowed):
    gap = Gap.of(off(found), OWN, None if again is None else off(again), HALF)
    assert gap.apart == pytest.approx(found, rel=1e-4)
    assert gap.allowed == pytest.approx(allowed, rel=1e-4)
    assert gap.fits == fits


def test_nan_never_fits():
    nan = torch.full((2,), float("nan"))
    assert not Gap.of(nan, OWN, None, HALF).fits
    assert not Gap.of(off(0.06), OWN, nan, HALF).fits


def test_the_worst_is_the_one_that_does_not_fit():
    good, bad = Gap(0.01, 0.05), Gap(0.2, 0.05)
    assert Gap.worst(good, bad) is bad
    assert Gap.worst(bad, good) is bad
    assert Gap.worst(good, Gap(0.02, 0.05)).fits


def test_a_models_own_step_is_its_pass(tiny):
    ids = torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    own = tiny.model(input_ids=ids).logits[0, -1]
    again = own_step(
        tiny.model, {"input_ids": ids[:, :-1]}, {"input_ids": ids[:, -1:], "attention_mask": mask, "position_ids": mask[:, -1:] * 8}
    )  # fmt: skip
    assert again is not None
    assert torch.allclose(own, again, atol=1e-5)
    other = own_step(tiny.model, {"input_ids": ids[:, :-1]}, {"input_ids": ids[:, :1], "attention_mask": mask})
    assert other is not None
    assert not torch.allclose(own, other, atol=1e-3)
    assert own_step(tiny.model, {"input_ids": ids, "nonsense": 1}, {"input_ids": None}) is None
