"""Generation with a gate: `never` is the stock model token for token, and a batch is its prompts one by one."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from conftest import save_tiny

from sedac_cli.errors import InputError
from sedac_cli.gates.base import Guards
from sedac_cli.gates.registry import build_gate
from sedac_cli.gates.simple import AlwaysGate
from sedac_cli.models import load_model
from sedac_cli.runtime.generate import GenerateOptions, generate

PROMPTS = ["the sea was grey and", "an old king", "x"]
GREEDY = GenerateOptions(max_new_tokens=12, ignore_eos=True)


def tokens(result) -> list[list[int]]:
    return [[t.token for t in row] for row in result.tokens]


def stock(loaded, prompt: str, **more) -> list[int]:
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = loaded.model.generate(ids, do_sample=False, pad_token_id=0, max_new_tokens=12, **more)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """A model that says token 0 whatever it reads, and ends at it."""

    def mute(model):
        model.lm_head.weight.zero_()

    return load_model(str(save_tiny(tmp_path_factory.mktemp("m") / "early", change=mute, eos_token_id=0)))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_never_is_the_stock_model(tiny, prompt):
    result = generate(tiny, build_gate("never", tiny.decoder), [prompt], GREEDY)
    expected = stock(tiny, prompt, eos_token_id=None)
    assert tokens(result) == [expected]
    assert len(set(expected)) > 2
    assert (result.skip_ratio, result.skip_ratio_decode, result.average_exit_layer) == (0.0, 0.0, 4.0)


def test_a_model_saved_with_its_cache_off_uses_it(tiny, monkeypatch):
    monkeypatch.setattr(tiny.model.generation_config, "use_cache", False)
    seen = []
    gate = build_gate("always:2", tiny.decoder)
    result = generate(tiny, gate, [PROMPTS[0]], GREEDY, on_pass=lambda done: seen.append(done.skipped.shape[1]))
    assert seen == [result.prompt_tokens] + [1] * 11


def test_never_is_the_stock_model_of_the_built_in_one(builtin):
    prompt = "The sea was"
    result = generate(builtin, build_gate("never", builtin.decoder), [prompt], GenerateOptions(max_new_tokens=12))
    assert tokens(result) == [stock(builtin, prompt)]
    assert result.texts[0].isprintable()


@pytest.mark.parametrize("spec", ["never", "always:2"])
def test_a_left_padded_batch_equals_its_prompts_alone(tiny, spec):
    gate = build_gate(spec, tiny.decoder, guards=Guards(sinks=4))
    together = generate(tiny, gate, PROMPTS, GREEDY)
    alone = [generate(tiny, gate, [prompt], GREEDY) for prompt in PROMPTS]
    assert tokens(together) == [tokens(one)[0] for one in alone]
    assert together.texts == [one.texts[0] for one in alone]
    assert together.prompt_tokens == sum(one.prompt_tokens for one in alone)
    assert [[t.skipped for t in row] for row in together.tokens] == [
        [t.skipped for t in one.tokens[0]] for one in alone
    ]
    weights = [one.prompt_tokens + one.new_tokens - 1 for one in alone]
    mean = sum(w * one.skip_ratio for w, one in zip(weights, alone, strict=True)) / sum(weights)
    assert together.skip_ratio == pytest.approx(mean)


def test_what_is_counted(tiny):
    result = generate(tiny, AlwaysGate(4, 1, Guards(sinks=4)), ["the sea was grey"], GREEDY)
    n = result.prompt_tokens
    assert result.new_tokens == 12
    assert result.skip_ratio_decode == 0.75
    assert result.skip_ratio == pytest.approx(0.75 * (n - 4 + 11) / (n + 11))  # the first four positions never skip
    assert {(t.skipped, t.exit_layer) for t in result.tokens[0]} == {(3, 1)}


def test_the_end_of_text_ends_a_row_unless_ignored(early):
    gate = build_gate("always:2", early.decoder)
    result = generate(early, gate, PROMPTS[:2], GenerateOptions(max_new_tokens=5))
    assert tokens(result) == [[0], [0]]
    assert result.new_tokens == 2
    on = generate(early, gate, PROMPTS[:2], GenerateOptions(max_new_tokens=5, ignore_eos=True))
    assert tokens(on) == [[0] * 5] * 2


def test_padding_after_an_end_is_not_counted(tiny, monkeypatch):
    """One row ends before the other: what the finished row's padding skipped is nobody's."""
    rows = tokens(generate(tiny, build_gate("never", tiny.decoder), PROMPTS[:2], GREEDY))
    end = next(t for t in rows[0][:4] if t not in rows[1])
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", end)
    result = generate(tiny, build_gate("never", tiny.decoder), PROMPTS[:2], GenerateOptions(max_new_tokens=12))
    length = rows[0].index(end) + 1
    assert [len(row) for row in result.tokens] == [length, 12]
    gated = generate(tiny, build_gate("always:0", tiny.decoder), PROMPTS[:2], GenerateOptions(max_new_tokens=12))
    assert gated.skip_ratio == gated.skip_ratio_decode == 1.0


def test_sampling_is_seeded(tiny):
    def sample(seed, **more):
        rule = build_gate("random:0.3", tiny.decoder, seed=seed)
        return tokens(generate(tiny, rule, PROMPTS, GenerateOptions(12, seed=seed, ignore_eos=True, **more)))

    assert sample(1, temperature=1.0) == sample(1, temperature=1.0)
    assert sample(1, temperature=1.0) != sample(2, temperature=1.0)
    narrow = sample(3, temperature=5.0, top_k=1)
    assert narrow == sample(3)  # the best of one is the best
    assert sample(3, temperature=0.2, top_p=0.01) == narrow


def test_a_prompt_over_the_context_is_refused(tiny):
    with pytest.raises(
        InputError, match="a prompt of 121 tokens and 12 new ones exceed the model's 128 positions"
    ) as caught:
        generate(tiny, build_gate("never", tiny.decoder), ["x" * 121], GREEDY)
    assert caught.value.hint == "--max-new-tokens 7 or a shorter prompt"
    assert generate(tiny, build_gate("never", tiny.decoder), ["x" * 116], GREEDY).new_tokens == 12


def test_nothing_to_continue(tiny):
    for prompts in ([], [""], ["x", ""]):
        with pytest.raises(InputError, match="nothing to continue"):
            generate(tiny, build_gate("never", tiny.decoder), prompts, GREEDY)


def test_a_chat_prompt_is_the_templates_text_and_no_more(tiny, monkeypatch):
    """A tokenizer that adds a token of its own must not add it to what the template has written."""
    from tokenizers.processors import TemplateProcessing

    from sedac_cli.runtime.generate import encode_prompts

    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
    )
    with pytest.raises(InputError, match="no chat template"):
        generate(tiny, build_gate("never", tiny.decoder), ["hi"], GenerateOptions(chat=True))
    loaded = load_model(tiny.identity.ref)
    loaded.tokenizer.chat_template = template
    loaded.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1)]
    )
    plain = encode_prompts(loaded, ["hi"], GenerateOptions())["input_ids"]
    chat = encode_prompts(loaded, ["hi"], GenerateOptions(chat=True))["input_ids"]
    assert loaded.tokenizer.decode(plain[0]) == "<|endoftext|>hi"
    assert loaded.tokenizer.decode(chat[0]) == "[user]hi[bot]"


# The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_folder):
    return ["generate", "--model", tiny_folder, "--max-new-tokens", 4, "--ignore-eos"]


def test_prompts_from_the_command_line_stdin_and_a_file(sedac, command, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_bytes("\ufeffone é\r\n\n two \n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from ünder\n".encode())))
    result = sedac(*command, "-p", "given", "--prompt", "-", "--prompt-file", tmp_path / "prompts.txt")
    assert result.code == 0
    parts = result.out.split("--- prompt ")[1:]
    assert [part.split("\n", 1)[1][:5] for part in parts] == ["given", "from ", "one é", " two "]
    assert "16 tokens, " in result.err


def test_prompts_that_cannot_be_read(sedac, command, tmp_path, monkeypatch):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    for args in (["--prompt-file", tmp_path / "bad.txt"], ["--prompt-file", tmp_path / "none.txt"], ["--prompt", "-"]):
        assert sedac(*command, *args).code == 3
    (tmp_path / "empty.txt").write_text("\n \n")
    assert sedac(*command, "--prompt-file", tmp_path / "empty.txt").code == 2
    assert sedac(*command, "--prompt", "").code == 3


def test_one_prompt_prints_prompt_and_text(sedac, command, tiny):
    expected = generate(tiny, build_gate("never", tiny.decoder), ["the sea"], GenerateOptions(4, ignore_eos=True))
    assert sedac(*command, "--prompt", "the sea").out == "the sea" + expected.texts[0] + "\n"


def test_exits_are_shown_as_numbers_where_there_is_no_colour(sedac, command):
    result = sedac(*command, "--prompt", "the sea", "--gate", "always:1", "--show", "exits")
    assert result.code == 0
    assert result.out.count("[3]") == 4
    assert "MLPs skipped" in result.out
    assert "\x1b[" not in result.out
    assert sedac(*command, "--prompt", "x", "--show", "colours").code == 2


def test_the_json_document(sedac, command):
    document = sedac(*command, "--prompt", "the sea", "--gate", "always:1", "--json").json
    assert document["new_tokens"] == len(document["tokens"][0]) == 4
    assert document["skip_ratio_decode"] == 0.75
    assert json.dumps(document["texts"])


def test_never_on_the_command_line_in_bfloat16(sedac, command, tiny_folder):
    document = sedac(*command, "--prompt", "the sea", "--dtype", "bfloat16", "--json").json
    loaded = load_model(str(tiny_folder))
    loaded.model.to(torch.bfloat16)
    ids = loaded.tokenizer("the sea", return_tensors="pt")["input_ids"]
    out = loaded.model.generate(ids, do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    assert [t["token"] for t in document["tokens"][0]] == out[0, ids.shape[1] :].tolist()
