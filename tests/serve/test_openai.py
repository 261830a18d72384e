"""The real OpenAI client against the real server: streamed or whole, the answers are those of `generate`."""

from __future__ import annotations

import math

import openai
import pytest
from serving import serving

from sedac_cli.gates.base import Guards
from sedac_cli.models import load_model
from sedac_cli.runtime.generate import GenerateOptions, chat_text, generate
from sedac_cli.runtime.plan import make_plan


@pytest.fixture(scope="module")
def server(chatty_folder):
    with serving(load_model(str(chatty_folder))) as running:  # its own: the server's thread may still be at work
        yield running


PROMPT = "the sea was grey and"


def reference(chatty, prompt=PROMPT, gate="always:2", **options):
    plan = make_plan(gate, chatty.decoder, guards=Guards(sinks=2))
    return generate(chatty, plan.gate, [prompt], GenerateOptions(**options), plan.standin)


def complete(server, **more):
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0} | more
    return server.client().completions.create(**options)


def streamed(chunks):
    texts, ends, last = {}, {}, None
    for chunk in chunks:
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.text or "")
            ends[choice.index] = ends.get(choice.index) or choice.finish_reason
    return texts, ends, last


def test_a_completion_is_what_generate_gives(server, chatty):
    found, wanted = complete(server), reference(chatty, max_new_tokens=24)
    assert found.choices[0].text == wanted.texts[0]
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (wanted.prompt_tokens, 24)
    assert found.sedac["skip_ratio"] == pytest.approx(wanted.skip_ratio)
    assert found.sedac["avg_exit_layer"] == pytest.approx(wanted.average_exit_layer)
    assert found.sedac["exits"] == {"2": wanted.prompt_tokens - 2 + 23}


@pytest.mark.parametrize("seed", range(4))
def test_streaming_gives_the_same_text(server, chatty, seed):
    options = {"temperature": 1.5, "seed": seed, "max_tokens": 40}
    whole = complete(server, **options)
    texts, ends, last = streamed(complete(server, **options, stream=True, stream_options={"include_usage": True}))
    assert texts == {0: whole.choices[0].text}
    assert ends == {0: whole.choices[0].finish_reason}
    assert last.usage == whole.usage
    assert last.sedac == whole.sedac
    wanted = reference(chatty, max_new_tokens=40, temperature=1.5, seed=seed)
    assert whole.choices[0].text == wanted.texts[0]


def test_several_prompts_and_choices(server, chatty):
    prompts = [PROMPT, "an old king"]
    found = complete(server, prompt=prompts, n=2, temperature=1.0, seed=7, max_tokens=10)
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    wanted = [
        reference(chatty, p, max_new_tokens=10, temperature=1.0, seed=s).texts[0] for p in prompts for s in (7, 8)
    ]
    assert [c.text for c in found.choices] == wanted
    assert found.usage.prompt_tokens == sum(len(chatty.tokenizer(p)["input_ids"]) for p in prompts)
    texts, _, _ = streamed(
        complete(server, prompt=prompts, n=2, temperature=1.0, seed=7, max_tokens=10, stream=True)
    )  # fmt: skip
    assert [texts[i] for i in range(4)] == wanted


def test_token_ids_are_a_prompt(server, chatty):
    ids = chatty.tokenizer(PROMPT)["input_ids"]
    text = complete(server).choices[0].text
    assert complete(server, prompt=ids).choices[0].text == text
    assert [c.text for c in complete(server, prompt=[ids, ids]).choices] == [text, text]


def test_without_a_seed_draws_differ_and_with_one_they_do_not(server):
    drawn = {complete(server, temperature=2.0).choices[0].text for _ in range(3)}
    assert len(drawn) == 3
    assert len({complete(server, temperature=2.0, seed=5).choices[0].text for _ in range(2)}) == 1


def test_stop_strings(server):
    text = complete(server, max_tokens=60).choices[0].text
    stop = text[30:33]
    found = complete(server, max_tokens=60, stop=[stop, "never there"])
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 60
    texts, ends, _ = streamed(complete(server, max_tokens=60, stop=stop, stream=True))
    assert (texts, ends) == ({0: found.choices[0].text}, {0: "stop"})


def test_logprobs(server, chatty):
    found = complete(server, max_tokens=6, logprobs=2).choices[0].logprobs
    ids = [t.token for t in reference(chatty, max_new_tokens=6).tokens[0]]
    assert found.tokens == [chatty.tokenizer.decode([i]) for i in ids]
    assert all(
        math.isclose(max(top.values()), p) for top, p in zip(found.top_logprobs, found.token_logprobs, strict=True)
    )
    assert all(1 <= len(top) <= 2 and p < 0 for top, p in zip(found.top_logprobs, found.token_logprobs, strict=True))


def test_chat(server, chatty):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the sea?"}]
    client = server.client()
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=1)
    text = chat_text(chatty, messages)
    assert text == "<system>be brief\n<user>the sea?\n<assistant>"
    wanted = reference(chatty, text, max_new_tokens=20)
    assert whole.choices[0].message.content == wanted.texts[0]
    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].logprobs.content) == 20
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted.texts[0]
    assert chunks[-1].choices[0].finish_reason == "length"
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "sea?"}]}]
    found = client.chat.completions.create(**options | {"messages": [messages[0], *parts]})
    assert found.choices[0].message.content == wanted.texts[0]


def test_dense_for_one_request(server, chatty):
    found = complete(server, extra_body={"sedac": {"dense": True}})
    assert found.choices[0].text == reference(chatty, gate="never", max_new_tokens=24).texts[0]
    assert found.choices[0].text != complete(server).choices[0].text
    assert found.sedac["skip_ratio"] == 0


def test_generate_and_batch_generate(server, chatty):
    wanted = reference(chatty, max_new_tokens=9)
    found = server.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 9, "details": True}).json()
    assert found["generated_text"] == wanted.texts[0]
    assert found["skip_ratio"] == pytest.approx(wanted.skip_ratio)
    assert found["avg_exit_layer"] == pytest.approx(wanted.average_exit_layer)
    assert [(t["token"], t["skipped"]) for t in found["tokens"]] == [(t.token, t.skipped) for t in wanted.tokens[0]]
    both = server.post("/batch_generate", json={"prompts": [PROMPT, "x"], "max_new_tokens": 9}).json()
    assert [r["generated_text"] for r in both["results"]] == [
        wanted.texts[0], reference(chatty, "x", max_new_tokens=9).texts[0],
    ]  # fmt: skip
    assert both["calls"]["decode"] == 16


def test_models_and_health(server):
    assert [m.id for m in server.client().models.list().data] == ["tiny"]
    assert server.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="has 'tiny'"):
        complete(server, model="gpt-4")


def test_counters_are_the_sums_of_what_clients_saw(server):
    server.wait(server.quiet)
    before = server.counters()
    seen = [
        complete(server, prompt=["the sea", "a"], n=2, max_tokens=11, temperature=1.0).model_dump(),
        complete(server, max_tokens=5, extra_body={"sedac": {"dense": True}}).model_dump(),
        streamed(complete(server, stream=True, stream_options={"include_usage": True}))[2].model_dump(),
        server.post("/batch_generate", json={"prompts": ["king", "hill"], "max_new_tokens": 3}).json(),
    ]
    after = server.counters()

    def rose(name):
        return after[name] - before.get(name, 0)

    for phase in ("prefill", "decode"):
        assert rose(f"sedac_calls_total{{{phase}}}") == sum(s.get("sedac", s)["calls"][phase] for s in seen)
    for layer in range(4):
        assert rose(f"sedac_exits_total{{{layer}}}") == sum(s.get("sedac", s)["exits"].get(str(layer), 0) for s in seen)
    new = sum(s["usage"]["completion_tokens"] for s in seen[:3]) + 6
    assert rose("sedac_generated_tokens_total") == rose("sedac_entropy_bits_count") == new
    assert rose("sedac_requests_total{completions,ok}") == 3
    assert rose("sedac_requests_total{batch_generate,ok}") == 1
    assert after["sedac_skip_ratio"] == pytest.approx(after["sedac_mlps_skipped_total"] / after["sedac_mlps_total"])
    assert rose("sedac_request_seconds_count{completions}") == 3
