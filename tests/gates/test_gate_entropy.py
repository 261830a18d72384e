"""The entropy gate against its formula, its anchors and its lenses."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_model
from gate_helpers import ColumnLens, by_hand, random_probe

from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.base import Guards
from sedac_cli.gates.entropy import EntropyGate
from sedac_cli.gates.lens import HeadLens, ProbeLens, find_final_norm
from sedac_cli.gpu.reference import entropy_decision, entropy_of_logits
from sedac_cli.structure import find_decoder

OPEN = Guards()


def test_the_rule_by_hand():
    hidden = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    previous = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    entropy = torch.tensor([1.0, 5.0])
    confidence, load, skips = entropy_decision(entropy, hidden, previous, 3.0, 2.0, 0.5, 0.5)
    sure, unsure = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))
    assert confidence.tolist() == pytest.approx([sure, unsure])
    # calm: 1 / (1 + 0) and 1 / (1 + 5/5)
    assert load.tolist() == pytest.approx([0.5 * (1 - sure) + 0.1, 0.5 * (1 - unsure) + 0.15 + 0.1])
    assert (sure * 0.5 > 0.4, unsure * 0.5 * 0.5 > 0.4) == (True, False)
    assert skips.tolist() == [True, False]


def test_the_threshold_bends_with_depth():
    """conf * stab * p > t - .2 p: with conf = .9, stab = 1, the boundary is p = t / 1.1."""
    hidden = torch.ones(1, 2)
    entropy = torch.tensor([-math.log(9) / 2])
    for progress, expected in ((0.62, False), (0.65, True)):
        skips = entropy_decision(entropy, hidden, hidden, 0.0, -1.0 * -1.0, progress, 0.7)[2]
        confidence = torch.sigmoid(-2 * entropy)
        assert confidence.item() == pytest.approx(0.9)
        assert skips.item() is expected


def flat_states(layers, entropies):
    """States that do not move; column 0 is the entropy the lens reports at each layer."""
    return [torch.tensor([[row[layer]] + [100.0] * 3 for row in entropies]) for layer in range(layers)]


def test_a_decision_holds_until_the_next_check_and_anchors_run():
    gate = EntropyGate(12, ColumnLens(), 3.0, 1.0, threshold=0.3, min_exit_layer=4, guards=OPEN)
    assert gate.checks == [5, 9]
    low, high = 0.0, 6.0
    rows = [[low] * 12, [high] * 12, [low] * 8 + [high] * 4, [high] * 8 + [low] * 4]
    scales, exit_layer = by_hand(gate, flat_states(12, rows))
    run = [1] * 5
    assert scales.T.tolist() == [
        [*run, 0, 0, 0, 1, 0, 0, 0],
        [*run, 1, 1, 1, 1, 1, 1, 1],
        [*run, 0, 0, 0, 1, 1, 1, 1],
        [*run, 1, 1, 1, 1, 0, 0, 0],
    ]
    assert exit_layer.tolist() == [5, 12, 5, 9]


def test_what_the_default_options_check():
    checks = lambda **more: EntropyGate(28, ColumnLens(), 3.0, 1.0, **more).checks  # noqa: E731
    assert checks() == [17, 21, 25]  # 1.2 * 13 / 28 < 0.7: a check at 13 could not fire
    assert checks(threshold=0.2) == [5, 9, 13, 17, 21, 25]
    assert checks(threshold=0.2, min_exit_layer=10) == [13, 17, 21, 25]
    assert checks(anchor_interval=1) == []
    assert checks(anchor_interval=0, min_exit_layer=22) == [22, 23, 24, 25, 26]
    assert EntropyGate(28, ColumnLens(), 3.0, 1.0).guards == Guards(sinks=4, first=2, last=1)


def test_checks_left_out_by_default_could_not_have_fired():
    for layer in range(1, 17):
        sure, calm = torch.tensor([-100.0]), torch.ones(1, 2)
        assert not entropy_decision(sure, calm, calm, 0.0, 1.0, layer / 28, 0.7)[2].item()
    assert entropy_decision(sure, calm, calm, 0.0, 1.0, 17 / 28, 0.7)[2].item()


def test_each_check_has_its_own_statistics():
    gate = EntropyGate(
        12, ColumnLens(), {5: 9.0, 9: -9.0}, {5: 1.0, 9: 2.0}, 0.3, min_exit_layer=4, checks=[5, 9], guards=OPEN
    )
    scales, _ = by_hand(gate, flat_states(12, [[3.0] * 12]))
    assert scales[5].item() == 0
    assert scales[9].item() == 1
    with pytest.raises(UsageError, match=r"no sd for \[9\]"):
        EntropyGate(12, ColumnLens(), 1.0, {5: 1.0}, 0.1, checks=[5, 9])


def test_nonsense_is_refused():
    with pytest.raises(UsageError, match="sd must be > 0"):
        EntropyGate(12, ColumnLens(), 1.0, 0.0, 0.1)
    with pytest.raises(UsageError, match="before min_exit_layer"):
        EntropyGate(12, ColumnLens(), 1.0, 1.0, checks=[2])
    with pytest.raises(UsageError, match=r"its lens has none for \[9\]"):
        EntropyGate(12, ProbeLens({5: random_probe(4)}), 1.0, 1.0, checks=[5, 9])


def test_what_looking_costs():
    gate = EntropyGate(12, ColumnLens(), 3.0, 1.0, threshold=0.1)
    assert gate.cost_per_token(4) == {5: 27.0, 9: 27.0}
    model = tiny_model()
    assert HeadLens(find_decoder(model)).cost_per_token(1, 32) == 2 * 32 * 97
    assert ProbeLens({5: random_probe(32)}).cost_per_token(5, 32) == 2 * 33 * 4


# opt's final norm has a bias and lies inside model.decoder, gemma2 caps its logits
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "opt"])
def test_the_head_lens_at_the_last_state_is_the_models_own_entropy(family):
    changes = {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {}
    changes |= {"head_dim": 8, "sliding_window": 64} if family == "gemma2" else {}
    model = tiny_model(family, **changes)
    decoder = find_decoder(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.normal_(1.0, 0.3)
    lens = HeadLens(decoder)
    ids = torch.arange(3, 11).unsqueeze(0)
    last = []
    handle = decoder.layers[-1].register_forward_hook(lambda m, a, o: last.append(o[0] if isinstance(o, tuple) else o))
    logits = model(ids).logits
    handle.remove()
    own = entropy_of_logits(logits[0])[0]
    torch.testing.assert_close(lens(3, last[0].reshape(-1, 32)), own, rtol=1e-5, atol=1e-5)


def test_the_final_norm_is_found_by_what_it_does():
    model = tiny_model()
    model.model.decoy = torch.nn.LayerNorm(32)
    assert find_final_norm(find_decoder(model)) is model.model.norm
    model.model.register_forward_hook(lambda m, a, o: setattr(o, "last_hidden_state", o.last_hidden_state + 1))
    with pytest.raises(InputError, match="final norm"):
        find_final_norm(find_decoder(model))
