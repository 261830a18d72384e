"""The Python API: what it returns is what the model did, whatever the caller hands over as the model."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, words

from sedac_cli import create_pipeline, create_sedac_engine
from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.costs import model_costs
from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Guards
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.gates.entropy import EntropyGate
from sedac_cli.gates.lens import HeadLens
from sedac_cli.gates.simple import AlwaysGate
from sedac_cli.runtime.plan import Plan
from sedac_cli.standins import ZeroStandIn
from sedac_cli.structure import find_decoder

LAYERS = 8
OPTIONS = {"exit_threshold": 0.2, "min_exit_layer": 2, "anchor_interval": 3, "protect_first_n": 1}


@pytest.fixture(scope="module")
def model():
    """Eight layers that leave most of the state as it was, so that the entropy gate finds something to skip."""
    model = tiny_model(num_hidden_layers=LAYERS, vocab_size=265)
    model.lm_head.weight.mul_(30)
    return model


@pytest.fixture(scope="module")
def batch():
    """Two sequences, the second left-padded by 5."""
    ids = torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids.masked_fill(mask == 0, 0), mask


def test_never_is_the_stock_model_bit_for_bit(model, batch):
    ids, mask = batch
    result = create_sedac_engine(model, gate="never").forward(ids, attention_mask=mask)
    assert torch.equal(result.logits, model(ids, attention_mask=mask).logits)
    assert (result.skip_ratio, result.compute_saved, result.avg_exit_layer) == (0.0, 0.0, LAYERS)
    assert (result.exit_layers == LAYERS).all()


def test_skipped_mlps_are_not_computed_and_are_counted(model, batch):
    ids, mask = batch
    rows = []
    handles = [
        layer.mlp.down_proj.register_forward_hook(lambda m, a, o: rows.append(o.shape[-2]))
        for layer in model.model.layers
    ]
    result = create_sedac_engine(model, gate=AlwaysGate(LAYERS, 5, Guards(sinks=4))).forward(ids, mask)
    for handle in handles:
        handle.remove()
    real, skipping = 14 + 9, 10 + 5
    assert rows == [14] * 5 + [28 - skipping] * 3  # packed: both sequences, padding among them, less those that skip
    assert result.skip_ratio == pytest.approx(3 * skipping / (real * LAYERS))
    assert result.skipped.tolist() == [[0] * 4 + [3] * 10, [0] * 9 + [3] * 5]
    assert result.exit_layers.tolist() == [[8] * 4 + [5] * 10, [8] * 9 + [5] * 5]
    assert result.avg_exit_layer == pytest.approx((5 * skipping + 8 * (real - skipping)) / real)
    costs = model_costs(find_decoder(model), 11)
    assert result.compute_saved == pytest.approx(skipping / real * sum(costs.mlp[5:]) / costs.total)


def test_fields_are_read_either_way(model, batch):
    result = create_sedac_engine(model, gate="always:5")(batch[0])
    assert result["skip_ratio"] == result.skip_ratio > 0
    assert set(result.keys()) >= {"logits", "skip_ratio", "exit_layers"}
    with pytest.raises(KeyError):
        result["__class__"]


def test_the_default_rule_is_the_entropy_gate_with_these_options(model, batch):
    ids, mask = batch
    engine = create_sedac_engine(model, **OPTIONS, mean=5.0, sd=2.0)
    decoder = find_decoder(model)
    gate = EntropyGate(LAYERS, HeadLens(decoder), 5.0, 2.0, 0.2, 3, 2, guards=Guards(4, 1, 1))
    expected = create_sedac_engine(model, gate=gate).forward(ids, mask)
    result = engine.forward(ids, mask)
    assert 0 < result.skip_ratio < 0.9
    assert torch.equal(result.exit_layers, expected.exit_layers)
    assert torch.equal(result.logits, expected.logits)
    assert (result.skipped[0, :4] == 0).all()
    assert (result.skipped[1, :9] == 0).all()


def test_a_lower_threshold_skips_more(model, batch):
    ratios = [
        create_sedac_engine(model, **{**OPTIONS, "exit_threshold": t}, mean=5.0, sd=2.0).forward(*batch).skip_ratio
        for t in (0.6, 0.4, 0.3)
    ]
    assert ratios[0] < ratios[1] < ratios[2]


def test_a_padded_batch_is_its_sequences_alone(model, batch):
    ids, mask = batch
    engine = create_sedac_engine(model, **OPTIONS, mean=5.0, sd=2.0)
    together, alone = engine.forward(ids, mask), engine.forward(ids[1:, 5:])
    assert torch.equal(together.exit_layers[1, 5:], alone.exit_layers[0])
    torch.testing.assert_close(together.logits[1, 5:], alone.logits[0], rtol=1e-4, atol=1e-4)


def test_mean_and_spread_are_measured_on_the_given_text(model):
    tokenizer = tiny_tokenizer()
    text = words(70)
    gate = create_sedac_engine(model, **OPTIONS, tokenizer=tokenizer, text=text).gate
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids.shape[1] < 257
    states = model(ids, output_hidden_states=True).hidden_states
    assert gate.checks == [4]
    bits = torch.distributions.Categorical(
        logits=model.lm_head(model.model.norm(states[4][0, 4:])).double()
    ).entropy() / torch.log(torch.tensor(2.0, dtype=torch.double))
    assert gate.parameters()["mean"] == pytest.approx([bits.mean().item()], rel=1e-5)
    assert gate.parameters()["sd"] == pytest.approx([bits.std().item()], rel=1e-4)


def test_pieces_of_text_are_measured_alike_however_they_are_given(model, tmp_path):
    text = words(70)
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    given = [text, [text], TextSpec(str(file), samples=4, max_length=256)]
    found = [
        create_sedac_engine(model, **OPTIONS, tokenizer=tiny_tokenizer(), text=one).gate.parameters() for one in given
    ]
    assert found[0] == found[1] == found[2]
    other = create_sedac_engine(model, **OPTIONS, tokenizer=tiny_tokenizer(), text=words(70, 5)).gate.parameters()
    assert other["mean"] != found[0]["mean"]


def test_whatever_the_caller_calls_a_model(tiny_folder, tiny, batch):
    ids = batch[0][:1]
    ways = [str(tiny_folder), ModelSpec(str(tiny_folder)), tiny, tiny.model]
    results = [create_sedac_engine(way, gate="always:2").forward(ids).logits for way in ways]
    for logits in results[1:]:
        assert torch.equal(logits, results[0])


def test_without_a_tokenizer_mean_and_sd_have_to_be_given(model):
    with pytest.raises(UsageError, match="takes a tokenizer"):
        create_sedac_engine(model, **OPTIONS, mean=5.0)
    with pytest.raises(UsageError, match="no tokenizer"):
        create_pipeline(model, gate="never")
    assert create_sedac_engine(model, **OPTIONS, mean=5.0, sd=[2.0]).gate.name == "entropy"


def test_options_of_the_entropy_gate_beside_another_gate_are_refused(model):
    for options in ({"exit_threshold": 0.5}, {"protect_last_n": 2}, {"mean": 4.0}, {"text": "a"}):
        with pytest.raises(UsageError, match="belongs to the entropy gate"):
            create_sedac_engine(model, gate="always:2", **options)
    with pytest.raises(UsageError, match="out of range"):
        create_sedac_engine(model, exit_threshold=3.0, mean=5.0, sd=2.0)


def test_a_rule_that_can_never_skip_says_so(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sedac"), "propagate", True)
    engine = create_sedac_engine(model, min_exit_layer=7)
    assert "nothing is skipped" in caplog.text
    assert engine.forward(torch.tensor([[5, 6, 7, 8, 9, 10]])).skip_ratio == 0


def test_deep_thinking_is_paid(model, batch):
    ids, mask = batch
    dense = model(ids, attention_mask=mask).logits
    engine = create_sedac_engine(model, gate="always:4", deep=DeepThinking(0.0, 1))
    result = engine.forward(ids, mask)
    assert torch.equal(result.rounds, mask)
    assert torch.equal(result.logits[mask.bool()], dense[mask.bool()])
    # A pass without half of the MLPs, and a whole one: 1.5 of one.
    assert result.skip_ratio == pytest.approx(-0.5)
    assert -1 < result.compute_saved < -0.5


def test_verbose_says_what_every_pass_did(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sedac"), "propagate", True)
    with caplog.at_level(logging.INFO, "sedac"):
        create_sedac_engine(model, gate="always:4", verbose=True).forward(torch.tensor([[5, 6, 7]]))
    assert "always: 3 tokens, 50.0% of MLPs skipped" in caplog.text


# The pipeline -------------------------------------------------------------------------------------------------


def test_a_list_of_prompts_is_a_batch_of_its_prompts(tiny):
    pipeline = create_pipeline(tiny, gate=Plan(AlwaysGate(4, 2, Guards(sinks=4)), ZeroStandIn()))
    prompts = ["the sea was grey and", "an old king"]
    together = pipeline(prompts, max_new_tokens=6, ignore_eos=True)
    alone = [pipeline(prompt, max_new_tokens=6, ignore_eos=True) for prompt in prompts]
    assert together == alone
    assert all(one.generated_text == one.text and len(one.tokens) == 6 for one in alone)
    tokens = len(tiny.tokenizer(prompts[0])["input_ids"])
    assert alone[0].skip_ratio == pytest.approx((tokens + 5 - 4) * 2 / ((tokens + 5) * 4))
    assert alone[0].avg_exit_layer == 2.0


def test_the_pipeline_generates_what_the_model_would(tiny):
    ids = tiny.tokenizer("the sea was", return_tensors="pt")["input_ids"]
    expected = tiny.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    result = create_pipeline(tiny, gate="never")("the sea was", max_new_tokens=8, ignore_eos=True)
    assert [t.token for t in result.tokens] == expected[0, ids.shape[1] :].tolist()
    assert (result.skip_ratio, result.avg_exit_layer) == (0.0, 4.0)


def test_deep_thinking_in_the_pipeline_is_the_dense_model(tiny):
    def generate(**options):
        return create_pipeline(tiny, **options)("the sea was", max_new_tokens=8, ignore_eos=True)

    # From round 2 on the whole prompt runs again; each later token runs again at once.
    deep = generate(gate="always:1", deep=DeepThinking(0.0, 2))
    assert [t.token for t in deep.tokens] == [t.token for t in generate(gate="never").tokens]
    assert [t.token for t in generate(gate="always:1").tokens] != [t.token for t in deep.tokens]
    assert [t.rounds for t in deep.tokens] == [2] + [1] * 7
    assert deep.skip_ratio < 0


def test_unknown_options_are_named(tiny):
    pipeline = create_pipeline(tiny, gate="never")
    with pytest.raises(UsageError, match="no option 'max_tokens'"):
        pipeline("a", max_tokens=3)
