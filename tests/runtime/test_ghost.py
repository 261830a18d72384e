"""Whole layers skipped: true ghosts change nothing, nobody away changes no bit, and those away do no work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from torch import nn

from sedac_cli.artifacts.manifest import ModelIdentity
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.base import Gate, Guards
from sedac_cli.gates.learned import LearnedGate, Router
from sedac_cli.gates.simple import AlwaysGate, NeverGate, RandomGate
from sedac_cli.gates.span import SpanGate
from sedac_cli.runtime.kv import check_attention, recording, rotated
from sedac_cli.runtime.skip import skipping
from sedac_cli.standins.ghost import GhostKV
from sedac_cli.structure import find_decoder

LAYERS = (2, 3)
FAMILIES = ["qwen2", "llama", "mistral", "qwen3", "phi3", "gemma2", "olmo2", "stablelm"]
IDENTITY = ModelIdentity(
    ref="test", architecture={"hidden_size": 32}, config_digest="", tokenizer_digest="", dtype="float32",
    weights_sample=[],
)  # fmt: skip


class ByState(Gate):
    """Away where the entering state says so: the same token is away in every form of the same pass."""

    name = "by-state"

    def reads(self, layer):
        return layer == LAYERS[0]

    def rule(self, layer, hidden, state):
        return torch.ones_like(state.scale) if hidden is None else (hidden[:, 5] > 0).float()


class Oracle:
    """Knows what the dense model made of every token."""

    layers = LAYERS

    def __init__(self, seen, away):
        self.seen, self.mask = seen, away

    def rows(self, layer, x):
        return None

    def cost_per_token(self, layer):
        return 0.0

    def __call__(self, layer, hidden):
        return self.seen[layer].key[self.mask], self.seen[layer].value[self.mask]

    def leave(self, hidden):
        return self.seen[LAYERS[-1]].leaving[self.mask]


def made(family="qwen2", layers=6, **changes):
    model = tiny_model(family, num_hidden_layers=layers, **changes)
    for p in model.parameters():
        if p.dim() >= 2:
            p.mul_(4.0)
    return model, find_decoder(model)


def ghost_for(decoder, rank=4):
    torch.manual_seed(1)
    ghost = GhostKV(LAYERS, decoder.hidden_size, *check_attention(decoder, LAYERS), rank=rank)
    for p in ghost.parameters():
        nn.init.normal_(p, std=0.3)
    return ghost.requires_grad_(False)


def tokens(batch=3, length=12):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_true_ghosts_change_nothing(family, attention):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("gemma2 caps its attention scores, which sdpa cannot")
    model, decoder = made(family)
    model.set_attn_implementation(attention)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with recording(decoder, LAYERS) as seen:
        dense = model(ids, attention_mask=mask, use_cache=False).logits
    away = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5) & mask.bool()
    away[2] = True  # a sequence of which nobody runs

    class Coded(Gate):
        def rule(self, layer, hidden, state):
            return (~away).flatten().float()

    gate = SpanGate(Coded(decoder.num_layers), LAYERS)
    with skipping(model, gate, Oracle(seen, away), decoder=decoder) as run:
        found = model(ids, attention_mask=mask, use_cache=False).logits
    assert run.skipped_per_layer == [0, 0, int(away.sum()), int(away.sum()), 0, 0]
    torch.testing.assert_close(found[mask.bool()], dense[mask.bool()], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nobody_away_is_bit_identical():
    model, decoder = made()
    ids = tokens()
    stock = model(ids).logits
    words = model.generate(ids, max_new_tokens=5, do_sample=False)
    names = [name for name, _ in model.named_modules()]
    with skipping(model, SpanGate(NeverGate(6), LAYERS), ghost_for(decoder), decoder=decoder):
        assert torch.equal(model(ids).logits, stock)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), words)
    assert torch.equal(model(ids).logits, stock)
    assert [name for name, _ in model.named_modules()] == names
    assert "forward" not in vars(decoder.layers[2])


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma2"])
def test_cached_decoding_agrees_with_the_uncached_pass(family):
    model, decoder = made(family)
    ghost, ids = ghost_for(decoder), tokens(length=16)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0  # left padding
    gate = SpanGate(ByState(6), LAYERS)
    with skipping(model, gate, ghost, decoder=decoder, keep_passes=True) as run:
        position = (mask.cumsum(1) - 1).clamp_min(0)
        whole = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        out = model(ids[:, :9], attention_mask=mask[:, :9], position_ids=position[:, :9], use_cache=True)
        rows = [out.logits]
        for t in range(9, 16):
            out = model(
                ids[:, t : t + 1], attention_mask=mask[:, : t + 1], position_ids=position[:, t : t + 1],
                past_key_values=out.past_key_values, use_cache=True,
            )  # fmt: skip
            rows.append(out.logits)
    skipped = run.passes[0].skipped
    assert 0.1 < float((skipped > 0).float().mean()) < 0.9
    assert torch.equal(torch.cat([p.skipped for p in run.passes[1:]], dim=1), skipped)
    torch.testing.assert_close(torch.cat(rows, 1)[mask.bool()], whole[mask.bool()], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_cached_step_of_which_nobody_runs():
    model, decoder = made()
    ids = tokens(length=8)
    with skipping(model, SpanGate(AlwaysGate(6, 0, Guards(sinks=3)), LAYERS), ghost_for(decoder), decoder=decoder):
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :5], use_cache=True)
        rest = [model(ids[:, t : t + 1], past_key_values=first.past_key_values).logits for t in range(5, 8)]
    torch.testing.assert_close(torch.cat([first.logits, *rest], 1), whole, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_sequence_is_not_changed_by_its_neighbours():
    model, decoder = made()
    ghost, ids = ghost_for(decoder), tokens()
    with skipping(model, SpanGate(ByState(6), LAYERS), ghost, decoder=decoder):
        together = model(ids).logits
        alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_that_are_away_do_no_work():
    model, decoder = made()
    ghost, ids = ghost_for(decoder), tokens(batch=1, length=20)
    rows = {}
    for layer in (1, 2, 3):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp"):
            module = decoder.layers[layer].get_submodule(name)
            module.register_forward_hook(
                lambda m, a, y, key=(layer, name): rows.__setitem__(key, a[0].shape[:-1].numel())
            )
    with skipping(model, SpanGate(ByState(6), LAYERS), ghost, decoder=decoder, keep_passes=True) as run:
        model(ids)
    stayed = 20 - int((run.passes[0].skipped > 0).sum())
    assert 0 < stayed < 20
    assert {key: n for key, n in rows.items() if key[0] == 1} == {(1, n): 20 for _, n in list(rows)[:3]}
    assert {n for (layer, _), n in rows.items() if layer in LAYERS} == {stayed}


@torch.no_grad()
def test_generate_with_padding_sees_the_same_as_each_prompt_alone():
    model, decoder = made()
    ghost = ghost_for(decoder)
    ids = tokens(batch=1, length=9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    both = torch.cat([padded, tokens(batch=2, length=13)[1:]])
    mask = (both != 0).long()
    with skipping(model, SpanGate(ByState(6), LAYERS), ghost, decoder=decoder):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        batch = model.generate(both, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(batch[0, 13:][: alone.shape[1] - 9], alone[0, 9:])


def test_rotation_is_taken_back_exactly():
    k = torch.randn(2, 5, 3, 8)
    angle = torch.rand(2, 5, 3) * 6
    angles = torch.cat([angle, angle], -1)  # six of eight dimensions turn
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()
    turned = rotated(k, (cos, sin))
    assert not torch.allclose(turned[..., :6], k[..., :6], atol=0.1)
    assert torch.equal(turned[..., 6:], k[..., 6:])
    torch.testing.assert_close(rotated(turned, (cos, sin), back=True), k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "why"), [("gpt2", "takes no"), ("cohere", "not rotated by position")])
def test_other_attention_is_refused_with_its_structure(family, why):
    _, decoder = made(family)
    with pytest.raises(InputError, match=why) as error:
        check_attention(decoder, LAYERS)
    assert "weights)" in str(error.value)


def test_who_may_decide():
    with pytest.raises(UsageError, match="reads the MLP's input"):
        SpanGate(LearnedGate(6, {2: Router(32)}, 0.0), LAYERS)
    model, decoder = made()
    with (
        pytest.raises(UsageError, match="just these layers"),
        skipping(model, SpanGate(NeverGate(6), (1, 2)), ghost_for(decoder)),
    ):
        pass
    gate = SpanGate(AlwaysGate(6, 0, Guards(sinks=3)), LAYERS)
    with skipping(model, gate, ghost_for(decoder), decoder=decoder, keep_passes=True) as run, torch.no_grad():
        model(tokens())
    assert run.passes[0].skipped.tolist() == [[0] * 3 + [2] * 9] * 3
    assert run.passes[0].exit_layer.tolist() == [[6] * 3 + [2] * 9] * 3
    coin = SpanGate(RandomGate(6, 0.4), LAYERS)
    with skipping(model, coin, ghost_for(decoder), decoder=decoder, keep_passes=True) as run, torch.no_grad():
        model(tokens())
    assert set(run.passes[0].skipped.flatten().tolist()) == {0, 2}


def test_file(tmp_path):
    _, decoder = made()
    ghost = ghost_for(decoder)
    path = tmp_path / "ghost.pth"
    with pytest.raises(InputError, match="belong to one model"):
        ghost.save(path)
    ghost.save(path, IDENTITY, {"steps": 3})
    again = GhostKV.load(path, IDENTITY)
    h = torch.randn(5, 32)
    assert all(torch.equal(a, b) for a, b in zip(ghost(3, h), again(3, h), strict=True))
    assert torch.equal(ghost.leave(h), again.leave(h))
    assert (again.recipe, again.layers) == ({"steps": 3}, LAYERS)
    other = IDENTITY.model_copy(update={"architecture": {"hidden_size": 64}})
    with pytest.raises(InputError, match="hidden_size is 32 there"):
        GhostKV.load(path, other)
    torch.save({"kind": "else"}, path)
    with pytest.raises(InputError, match="is not a ghost KV file"):
        GhostKV.load(path)


def test_wrong_shape_for_the_model():
    model, _ = made()
    ghost = GhostKV(LAYERS, 32, 1, 8)
    with (
        pytest.raises(InputError, match="1 x 8, the model's are 2 x 8"),
        skipping(model, SpanGate(NeverGate(6), LAYERS), ghost),
    ):
        pass


def test_cost_is_that_of_the_maps():
    ghost = GhostKV(LAYERS, 10, 2, 4, rank=3)
    assert ghost.cost_per_token(1) == 0
    assert ghost.cost_per_token(2) == 2 * (16 * 10 + 3 * 10 + 16 * 3)
    assert ghost.cost_per_token(3) == ghost.cost_per_token(2) + 2 * (10 * 10 + 3 * 10 + 10 * 3)
    assert SimpleNamespace(rows=ghost.rows).rows(2, None) is None
