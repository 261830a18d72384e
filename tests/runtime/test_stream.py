"""Streaming is `generate`, token by token: same tokens, same decisions, whatever else is in the batch."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import save_tiny

from sedac_cli.errors import InputError
from sedac_cli.gates.base import Guards
from sedac_cli.models import load_model
from sedac_cli.runtime.generate import GenerateOptions, generate
from sedac_cli.runtime.plan import make_plan
from sedac_cli.runtime.stream import Row, stream

PROMPTS = ["the sea was grey and", "an old king", "x"]
SPECS = ["never", "always:2", "stability:tau=0.5,k=1,min_layer=1"]


def plan_of(loaded, spec):
    return make_plan(spec, loaded.decoder, guards=Guards(sinks=2))


def ids(loaded, prompt):
    return tuple(loaded.tokenizer(prompt)["input_ids"])


def run(loaded, plan, rows):
    heard = [[] for _ in rows]

    def hear(token):
        heard[token.row].append(token)
        return True

    return heard, stream(loaded, plan, rows, hear)


def expected(loaded, plan, prompt, **options):
    result = generate(loaded, plan.gate, [prompt], GenerateOptions(**options), plan.standin)
    return result, [(t.token, t.skipped, t.exit_layer) for t in result.tokens[0]]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 4}]
)
def test_a_batch_gives_what_generate_gives_each_prompt_alone(tiny, spec, sampling):
    plan = plan_of(tiny, spec)
    rows = [Row(ids(tiny, p), max_new_tokens=12, ignore_eos=True, **sampling) for p in PROMPTS]
    heard, counts = run(tiny, plan, rows)
    for prompt, tokens, count in zip(PROMPTS, heard, counts, strict=True):
        result, wanted = expected(tiny, plan, prompt, max_new_tokens=12, ignore_eos=True, **sampling)
        assert [(t.token, t.skipped, t.exit_layer) for t in tokens] == wanted
        assert [t.finish for t in tokens] == [None] * 11 + ["length"]
        assert count.skip_ratio == pytest.approx(result.skip_ratio)
        assert count.average_exit_layer == pytest.approx(result.average_exit_layer)
        assert count.processed == {"prefill": result.prompt_tokens, "decode": 11}


def test_rows_have_their_own_sampling_and_length(tiny):
    plan = plan_of(tiny, "always:2")
    options = [{"max_new_tokens": 3}, {"max_new_tokens": 9, "temperature": 0.7, "seed": 5},
               {"max_new_tokens": 6, "temperature": 1.0, "top_k": 5, "seed": 1}]  # fmt: skip
    rows = [Row(ids(tiny, p), ignore_eos=True, **o) for p, o in zip(PROMPTS, options, strict=True)]
    heard, _ = run(tiny, plan, rows)
    for prompt, tokens, option in zip(PROMPTS, heard, options, strict=True):
        _, wanted = expected(tiny, plan, prompt, ignore_eos=True, **option)
        assert [(t.token, t.skipped, t.exit_layer) for t in tokens] == wanted


def test_a_row_ends_at_the_end_token_and_where_it_is_told(tiny, tmp_path):
    def mute(model):
        model.lm_head.weight.zero_()

    early = load_model(str(save_tiny(tmp_path / "early", change=mute, eos_token_id=0)))
    rows = [Row((5, 6, 7), max_new_tokens=8), Row((5, 6), max_new_tokens=8, ignore_eos=True)]
    heard, counts = run(early, plan_of(early, "always:2"), rows)
    assert [t.finish for t in heard[0]] == ["stop"]
    assert counts[0].processed == {"prefill": 3, "decode": 0}
    assert len(heard[1]) == 8

    told = []
    plan = plan_of(tiny, "always:2")
    counts = stream(tiny, plan, [Row((5, 6, 7), 50, ignore_eos=True)], lambda t: told.append(t) or len(told) < 4)
    assert len(told) == 4
    assert counts[0].new_tokens == 4
    assert counts[0].processed == {"prefill": 3, "decode": 3}
    assert told[-1].finish is None


def test_a_dense_row_skips_nothing_and_is_the_stock_model(tiny):
    plan = plan_of(tiny, "always:1")
    rows = [Row(ids(tiny, p), 10, ignore_eos=True, dense=i == 1) for i, p in enumerate(PROMPTS)]
    heard, counts = run(tiny, plan, rows)
    _, dense = expected(tiny, plan_of(tiny, "never"), PROMPTS[1], max_new_tokens=10, ignore_eos=True)
    assert [(t.token, t.skipped, t.exit_layer) for t in heard[1]] == dense
    assert (counts[1].skipped, counts[1].exits) == (0, {})
    _, gated = expected(tiny, plan, PROMPTS[0], max_new_tokens=10, ignore_eos=True)
    assert [(t.token, t.skipped, t.exit_layer) for t in heard[0]] == gated
    assert counts[0].exits == {1: counts[0].processed["prefill"] - 2 + 9}  # all but the two sinks


def test_entropy_and_probability_are_the_models(tiny):
    rows = [Row(ids(tiny, p), 4, ignore_eos=True, top_logprobs=3) for p in PROMPTS]
    heard, _ = run(tiny, plan_of(tiny, "never"), rows)
    for prompt, tokens in zip(PROMPTS, heard, strict=True):
        whole = [*ids(tiny, prompt), *(t.token for t in tokens)]
        logits = tiny.model(torch.tensor([whole])).logits[0, -5:-1]
        logprobs = torch.log_softmax(logits, -1)
        entropy = torch.distributions.Categorical(logits=logits).entropy() / math.log(2)
        for t, row, bits in zip(tokens, logprobs, entropy, strict=True):
            assert t.entropy == pytest.approx(float(bits), rel=1e-4)
            assert t.logprob == pytest.approx(float(row[t.token]), rel=1e-4)
            assert [i for i, _ in t.top] == row.topk(3).indices.tolist()
            assert t.top[0][1] == pytest.approx(t.logprob, rel=1e-5)


def test_the_prompt_is_told_before_its_first_token(tiny):
    order = []
    rows = [Row(ids(tiny, p), 2) for p in PROMPTS]
    stream(
        tiny, plan_of(tiny, "never"), rows, lambda t: order.append(("token", t.row)) or True,
        lambda row, counts: order.append(("prompt", row, counts.processed["prefill"])),
    )  # fmt: skip
    assert order[:3] == [("prompt", i, len(ids(tiny, p))) for i, p in enumerate(PROMPTS)]
    assert order[3] == ("token", 0)


def test_what_cannot_run_is_refused_and_the_model_is_left_clean(tiny):
    plan = plan_of(tiny, "always:1")
    with pytest.raises(InputError, match="128 positions"):
        stream(tiny, plan, [Row((1, 2, 3), 126)], lambda t: True)
    with pytest.raises(InputError, match="nothing to continue"):
        stream(tiny, plan, [Row((), 2)], lambda t: True)

    def broken(token):
        raise RuntimeError("listener")

    with pytest.raises(RuntimeError, match="listener"):
        stream(tiny, plan, [Row((1, 2, 3), 5)], broken)
    assert len(run(tiny, plan, [Row((1, 2, 3), 5, ignore_eos=True)])[0][0]) == 5
