"""Lossless decoding: greedy output is Hugging Face's own, token for token; sampling has the full model's distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import save_tiny, words
from scipy import stats

from sedac_cli.errors import InputError
from sedac_cli.models import load_model
from sedac_cli.runtime import rejection
from sedac_cli.runtime import speculate as module
from sedac_cli.runtime.generate import GenerateOptions, encode_prompts
from sedac_cli.runtime.plan import make_plan
from sedac_cli.runtime.speculate import SpeculateOptions, speculate

GREEDY = GenerateOptions(max_new_tokens=24, ignore_eos=True)
PROMPTS = [words(3 + 5 * seed, seed) for seed in range(6)]
WAYS = [
    SpeculateOptions(None),
    SpeculateOptions("gate", 3),
    SpeculateOptions("gate", 1),
    SpeculateOptions("gate", 6, adaptive=True),
    SpeculateOptions("ngram", 4),
    SpeculateOptions("suffix", 4, adaptive=True),
    SpeculateOptions("ngram_gate", 5, adaptive=True),
]


def dense(loaded, prompts: list[str], new: int = 24, **more) -> list[list[int]]:
    inputs = encode_prompts(loaded, prompts, GREEDY)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | more
    out = loaded.model.generate(**inputs, max_new_tokens=new, **settings)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def tokens(result) -> list[list[int]]:
    return [[t.token for t in row] for row in result.tokens]


def run(loaded, prompts, gate="random:0.3", options=GREEDY, how=None, **more):
    return speculate(loaded, make_plan(gate, loaded.decoder), prompts, options, how, **more)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_greedy_is_dense_on_many_prompts(tiny, how):
    proposed = 0
    for prompt in PROMPTS:
        result = run(tiny, [prompt], how=how)
        assert tokens(result) == dense(tiny, [prompt])
        proposed += result.proposed
    assert (proposed > 0) == (how.draft is not None)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_a_batch_whose_rows_keep_different_numbers_is_dense(tiny, how):
    result = run(tiny, PROMPTS, how=how)
    assert tokens(result) == dense(tiny, PROMPTS)


def test_the_built_in_model_and_drafts_that_are_partly_accepted(builtin):
    prompts = ["The sea was", "It was the best of times, it was the"]
    result = run(builtin, prompts, "always:24", GenerateOptions(max_new_tokens=20, ignore_eos=True))
    assert tokens(result) == dense(builtin, prompts, 20)
    assert 0 < result.accepted < result.proposed
    assert result.draft_skip_ratio == pytest.approx(4 / 28)
    assert result.skip_ratio == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "mistral", "gpt_neox", "bloom"])
def test_other_families(tmp_path, family):
    """Learned positions, windows narrower than the text, positions the model counts itself."""
    narrow = {"sliding_window": 8} if family in ("gemma2", "mistral") else {}
    named = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128} if family == "gpt2" else {}
    named |= {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {}
    named |= {"head_dim": 8} if family == "gemma2" else {}
    loaded = load_model(str(save_tiny(tmp_path / family, family, **narrow, **named)))
    for prompt in PROMPTS[:3]:
        assert tokens(run(loaded, [prompt])) == dense(loaded, [prompt])
    if family in ("gemma2", "mistral", "bloom"):
        with pytest.raises(InputError, match=r"window|counts positions"):
            run(loaded, PROMPTS)
    else:
        assert tokens(run(loaded, PROMPTS)) == dense(loaded, PROMPTS)


def test_up_to_the_last_position(tmp_path):
    """Rows that end early go on being computed beside the others: nothing may look up a position that is not there."""
    loaded = load_model(str(save_tiny(tmp_path / "m", "gpt2", n_embd=32, n_layer=4, n_head=4, n_positions=128)))
    width = encode_prompts(loaded, PROMPTS, GREEDY)["input_ids"].shape[1]
    options = GenerateOptions(max_new_tokens=128 - width, ignore_eos=True)
    assert tokens(run(loaded, PROMPTS, options=options)) == dense(loaded, PROMPTS, 128 - width)
    steps = module.Steps(loaded)
    steps.prefill(torch.arange(3, 129).unsqueeze(0), torch.ones(1, 126, dtype=torch.long))
    assert steps.forward([[3, 4, 5, 6]]).shape[1] == 4
    with pytest.raises(InputError, match="positions"):
        run(loaded, PROMPTS, options=GenerateOptions(max_new_tokens=129 - width))


def test_ends_where_dense_ends(tiny):
    expected = dense(tiny, [PROMPTS[0]])[0]
    end = expected[9]
    first = expected.index(end)
    config = tiny.model.generation_config
    before, config.eos_token_id = config.eos_token_id, end
    try:
        result = run(tiny, [PROMPTS[0], PROMPTS[1]], options=GenerateOptions(max_new_tokens=24))
    finally:
        config.eos_token_id = before
    assert tokens(result)[0] == expected[: first + 1]
    assert tokens(result)[1] == _until(dense(tiny, [PROMPTS[1]])[0], end)


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


def test_never_as_draft_is_always_accepted(tiny):
    result = run(tiny, [PROMPTS[0]], gate="never", how=SpeculateOptions("gate", 3))
    assert result.acceptance_rate == 1
    assert result.token_recovery_rate == pytest.approx(
        17 / 23
    )  # 23 tokens after the first: 5 steps of 3 + 1, one of 2 + 1
    assert (result.verify_steps, result.verify_tokens, result.proposed) == (6, 23, 17)
    assert sum(map(sum, result.drafted)) == 17


def test_states_of_drafts_are_taken_back(tiny, monkeypatch):
    """Not taking them back is what the identity tests must be able to see."""
    monkeypatch.setattr(module.Steps, "undo", lambda self, count: None)
    with pytest.raises((AssertionError, InputError, RuntimeError)):
        assert tokens(run(tiny, [PROMPTS[0]], gate="always:0")) == dense(tiny, [PROMPTS[0]])


def test_the_model_is_left_as_it_was(tiny):
    before = dense(tiny, [PROMPTS[2]])
    run(tiny, [PROMPTS[2]])
    assert dense(tiny, [PROMPTS[2]]) == before
    assert not any("forward" in m.__dict__ for m in tiny.model.modules())


def test_tokens_are_handed_over_as_they_come(tiny):
    seen: list[list[int]] = [[], []]

    def see(news):
        for row, tokens in zip(seen, news, strict=True):
            row += tokens

    result = run(tiny, PROMPTS[:2], on_tokens=see)
    assert seen == tokens(result)


def test_repetition_penalty_of_the_model_is_kept(tiny):
    config = tiny.model.generation_config
    config.repetition_penalty = 1.7
    try:
        assert (
            tokens(run(tiny, [PROMPTS[1]]))
            == dense(tiny, [PROMPTS[1]])
            != dense(tiny, [PROMPTS[1]], repetition_penalty=1.0)
        )
        config.no_repeat_ngram_size = 2
        with pytest.raises(InputError, match="no_repeat_ngram_size = 2"):
            run(tiny, [PROMPTS[1]])
    finally:
        config.repetition_penalty, config.no_repeat_ngram_size = None, None


def test_a_recurrent_model_is_refused(tmp_path):
    folder = save_tiny(
        tmp_path / "m", "lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"], block_multiple_of=8
    )
    with pytest.raises(InputError, match="cannot take tokens back"):
        run(load_model(str(folder)), [PROMPTS[0]])


# Sampling -----------------------------------------------------------------------------------------------------

SAMPLED = GenerateOptions(max_new_tokens=3, temperature=1.4, top_k=3, ignore_eos=True)
ROWS, CALLS, ALPHA = 100, 30, 1e-4


def drawn(loaded, gate: str, how: SpeculateOptions) -> list[tuple[int, ...]]:
    plan = make_plan(gate, loaded.decoder)
    found = []
    for seed in range(CALLS):
        options = GenerateOptions(**(SAMPLED.__dict__ | {"seed": seed}))
        found += [tuple(row) for row in tokens(speculate(loaded, plan, [PROMPTS[0]] * ROWS, options, how))]
    return found


@torch.inference_mode()
def exact(loaded) -> dict[tuple[int, ...], float]:
    """The chance of every possible continuation, from dense passes alone."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper

    prompt = encode_prompts(loaded, [PROMPTS[0]], SAMPLED)["input_ids"]
    found = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, chance in found.items():
            ids = torch.cat([prompt, torch.tensor([text], dtype=torch.long)], dim=1)
            scores = loaded.model(ids).logits[:, -1].float()
            p = TopKLogitsWarper(3)(None, TemperatureLogitsWarper(1.4)(None, scores)).softmax(-1)[0]
            longer |= {(*text, int(t)): chance * float(p[t]) for t in torch.nonzero(p).flatten()}
        found = longer
    return found


def p_value(samples: list[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    if any(sample not in chances for sample in samples):
        return 0.0
    expected = {text: chance * len(samples) for text, chance in chances.items()}
    counts = dict.fromkeys(expected, 0)
    for sample in samples:
        counts[sample] += 1
    rare = [text for text in expected if expected[text] < 8]  # the test wants some in every bin
    bins = [([counts[t]], [expected[t]]) for t in expected if t not in rare]
    if rare:
        bins.append(([sum(counts[t] for t in rare)], [sum(expected[t] for t in rare)]))
    observed, wanted = (list(itertools.chain(*column)) for column in zip(*bins, strict=True))
    scale = sum(observed) / sum(wanted)  # float32 chances add up to one but for their last bits
    return float(stats.chisquare(observed, [scale * x for x in wanted]).pvalue)


@pytest.mark.parametrize(
    ("gate", "how"),
    [("always:1", SpeculateOptions("gate", 2)), ("always:0", SpeculateOptions("gate", 2)), ("never", SpeculateOptions("ngram", 2, lookup_shortest=1))],
    ids=["gate", "a gate that is often wrong", "ngram"],
)  # fmt: skip
def test_sampling_has_the_distribution_of_the_full_model(tiny, gate, how):
    samples = drawn(tiny, gate, how)
    assert p_value(samples, exact(tiny)) > ALPHA


def test_a_wrong_rule_does_not_pass(tiny, monkeypatch):
    monkeypatch.setattr(module, "accept_sampled", lambda p, q, drafts, g: (len(drafts), rejection.draw(p[-1], g)))
    assert p_value(drawn(tiny, "always:1", SpeculateOptions("gate", 2)), exact(tiny)) < ALPHA


def test_the_same_seed_gives_the_same_text(tiny):
    options = GenerateOptions(max_new_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    first, again = (tokens(run(tiny, PROMPTS[:2], "always:2", options)) for _ in range(2))
    other = tokens(run(tiny, PROMPTS[:2], "always:2", GenerateOptions(**(options.__dict__ | {"seed": 4}))))
    assert first == again != other


# The command line ---------------------------------------------------------------------------------------------


def test_generate_lossless_is_generate_dense(sedac, tiny_folder):
    common = ("generate", "-m", tiny_folder, "-p", PROMPTS[0], "--max-new-tokens", 16, "--ignore-eos")
    plain, lossless = sedac(*common), sedac(*common, "--lossless", "--gate", "always:3", "--no-adapt")
    assert (plain.code, lossless.code) == (0, 0)
    assert lossless.out == plain.out
    assert "by this machine's clock" in lossless.err
    assert "by FLOPs, where a verify pass costs one dense step" in lossless.err
    found = sedac(*common, "--lossless", "--gate", "always:3", "--json", "-q").json
    assert found["proposed"] >= found["accepted"] >= 0
    assert found["break_even_flops"] > 0


def test_lossless_without_a_gate_is_refused(sedac, tiny_folder):
    result = sedac("generate", "-m", tiny_folder, "-p", "x", "--lossless")
    assert (result.code, "--draft ngram" in result.err) == (2, True)
    assert "Did you mean 'ngram'" in sedac("generate", "-m", tiny_folder, "-p", "x", "--draft", "ngrams").err
