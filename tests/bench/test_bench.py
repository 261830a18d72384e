"""`sedac bench` from the command line, on a random model: what it measures, what it refuses, how it ends."""

from __future__ import annotations

import json

import pytest
import torch

from sedac_cli import models, shapes
from sedac_cli.bench import runner
from sedac_cli.bench.backends.hf import EagerSession
from sedac_cli.bench.matrix import make_matrix
from sedac_cli.bench.workload import Workload
from sedac_cli.errors import InputError
from sedac_cli.runtime.skip import skipping

SMALL = ("--new-tokens", 6, "--repeats", 3, "--prompt-lengths", "12", "--quality-samples", 3, "-q")


@pytest.fixture
def bench(sedac, tmp_path, tiny_folder, text_file):
    def call(*args, model=True):
        own = ("-m", tiny_folder, "--dataset", text_file) if model else ()
        return sedac("bench", "--save-dir", tmp_path / "out", *own, *SMALL, *args)

    call.folder = tmp_path / "out"
    call.document = lambda: json.loads((tmp_path / "out" / "bench.json").read_text())
    return call


@pytest.fixture
def matrix(tmp_path, tiny_folder, text_file):
    def write(**document):
        path = tmp_path / "m.json"
        base = {"base_model": str(tiny_folder), "dataset": str(text_file), "split": None}
        path.write_text(json.dumps(base | document))
        return path

    return write


def test_figures_and_their_samples(bench):
    result = bench("--gates", "always:2,random:0.5", "--batch", "1,2")
    assert (result.code, result.err) == (0, "")
    found = bench.document()
    assert found["complete"]
    dense, always, coin = found["configurations"]
    assert [c["name"] for c in found["configurations"]] == ["dense", "always:2", "random:0.5"]
    assert [cell["label"] for cell in always["cells"]] == ["batch 1, prompt 12", "batch 2, prompt 12"]
    for cell in always["cells"]:
        own, base = cell["samples"]["own"], cell["samples"]["dense"]
        assert len(own) == len(base) == 3
        ratios = sorted(b["seconds"] / o["seconds"] for o, b in zip(own, base, strict=True))
        assert cell["speedup"]["median"] == pytest.approx(ratios[1])
        assert cell["skip_ratio_per_layer"] == [0, 0, 1, 1]
        assert all(len(o["itl"]) == 5 and o["new_tokens"] == 6 * cell["batch"] for o in own)
        assert own[0]["decided_tokens"] == own[0]["prompt_tokens"] + 5 * cell["batch"]
    assert 0.3 < coin["summary"]["skip_ratio"] < 0.7
    assert dense["cells"][0]["tokens_per_second"]["n"] == 6  # three beside each of the two
    assert dense["cells"][0]["skip_ratio"] is None
    assert always["quality"]["measures"]["ppl_ratio"] > 0
    assert len(always["quality"]["per_sequence"]["tokens"]) == 3
    assert found["machine"]["cores"] > 0
    assert found["versions"]["torch"]
    report = (bench.folder / "report.md").read_text()
    assert "## MLPs skipped per layer" in report
    assert "transformers generate(), the stock model" in report
    assert result.out.count("always:2") >= 4


def test_dense_is_the_stock_model(bench, tiny, monkeypatch):
    """Its runs must not have a gate installed, not even one that never skips."""
    seen = []
    original = EagerSession.run

    def run(self, prompts, new_tokens):
        wrapped = []
        handle = tiny_model(self).register_forward_pre_hook(lambda m, a: wrapped.append(has_hooks(self)))
        try:
            return original(self, prompts, new_tokens)
        finally:
            handle.remove()
            seen.append((self.plan is None, any(wrapped)))

    def tiny_model(session):
        return session.loaded.model

    def has_hooks(session):
        decoder = session.loaded.decoder
        return any(layer._forward_pre_hooks for layer in decoder.layers) or any(
            "forward" in branch.entry.__dict__ for branch in decoder.branches
        )

    monkeypatch.setattr(EagerSession, "run", run)
    assert bench("--gates", "never", "--quality-samples", 0).code == 0
    assert set(seen) == {(True, False), (False, True)}


def test_dense_keeps_its_cache(tiny, monkeypatch):
    """A model may be saved with its cache off; a baseline that computes the whole text at every step would flatter all else."""
    monkeypatch.setattr(tiny.model.generation_config, "use_cache", False)
    seen = []
    handle = tiny.decoder.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    try:
        run = EagerSession(tiny, None).run(["the sea was grey"], 5)
    finally:
        handle.remove()
    assert seen == [run.prompt_tokens, 1, 1, 1, 1]


def test_runs_alternate(bench, monkeypatch):
    order = []
    original = EagerSession.run
    monkeypatch.setattr(
        EagerSession,
        "run",
        lambda self, *args: (order.append("dense" if self.plan is None else "own"), original(self, *args))[1],
    )
    assert bench("--gates", "always:2", "--quality-samples", 0, "--warmup", 0).code == 0
    assert order == ["dense", "own", "own", "dense", "dense", "own"]  # whoever goes first pays for what both need


def test_limits_are_a_gate(bench):
    kept = bench("--gates", "always:2", "--max-ppl-ratio", 1e9, "--min-speedup", 0.001)
    assert (kept.code, kept.err) == (0, "")
    missed = bench("--gates", "always:2", "--max-ppl-ratio", 0.001, "--min-speedup", 1000)
    assert missed.code == 1
    assert "always:2: ppl ratio" in missed.err
    assert "limit 1000 (batch 1, prompt 12)" in missed.err
    assert [m["what"] for m in bench.document()["missed"]] == ["ppl ratio", "speed-up"]


def test_a_limit_on_what_was_not_measured_is_missed(bench):
    result = bench("--gates", "always:2", "--max-ppl-ratio", 5, "--quality-samples", 0)
    assert (result.code, "ppl ratio not measured" in result.err) == (1, True)


def test_a_crash_is_a_row_and_the_run_goes_on(bench, matrix, monkeypatch):
    from sedac_cli.gates.simple import RandomGate

    def broken(*args):
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(RandomGate, "rule", broken)
    experiments = [
        {"name": "burns", "gate": "random:0.5"},
        {"name": "no probe", "mode": "sedac", "sedac_layer": 1, "sedac_threshold": 1.0, "sedac_probe_dir": "/nowhere"},
        {"name": "graph", "gate": "always:3", "engine": "graph"},
        {"name": "fine", "gate": "always:3"},
    ]
    result = bench("--matrix", matrix(experiments=experiments), model=False)
    assert result.code == 3
    assert "3 of 5 configurations crashed: burns, no probe, graph" in result.err
    found = {c["name"]: c for c in bench.document()["configurations"]}
    assert found["fine"]["status"] == "ok"
    assert found["fine"]["quality"]
    assert found["burns"]["errors"][0]["error"] == "RuntimeError: the device is on fire"
    assert "in rule" in found["burns"]["errors"][0]["traceback"] or "broken" in found["burns"]["errors"][0]["traceback"]
    assert "/nowhere/sedac_probe_layer1.pth" in found["no probe"]["errors"][0]["error"]
    assert "needs a CUDA GPU" in found["graph"]["errors"][0]["error"]
    assert "the device is on fire" in result.out


def test_a_misspelt_gate_is_refused_before_anything_is_measured(bench, matrix):
    path = matrix(experiments=[{"name": "fine", "gate": "always:3"}, {"name": "typo", "gate": "alwys:3"}])
    result = bench("--matrix", path, model=False)
    assert (result.code, "Did you mean 'always'" in result.err) == (2, True)
    assert not (bench.folder / "bench.json").exists()


def test_the_page_beside_the_figures(bench):
    pytest.importorskip("matplotlib")
    result = bench("--gates", "always:2")
    assert str(bench.folder / "report.html") in result.out
    page = (bench.folder / "report.html").read_text()
    speedup = bench.document()["configurations"][1]["cells"][0]["speedup"]["median"]
    assert f"{speedup:.3f}x" in page


def test_lossless_modes(bench, matrix):
    experiments = [
        {
            "name": "lossless",
            "mode": "lossless",
            "gate": "always:3",
            "speculative_config": {"num_speculative_tokens": 2},
        },
        {"name": "ngram_sedac_adaptive", "mode": "ngram_sedac_adaptive", "gate": "always:3"},
        {"name": "loop", "mode": "loop"},
    ]
    path = matrix(experiments=experiments, thresholds={"min_ar": 0.0, "max_ppl_ratio": 1.0}, batch=[1, 2])
    result = bench("--matrix", path, model=False)
    assert (result.code, result.err) == (0, "")
    for configuration in bench.document()["configurations"][1:]:
        summary = configuration["summary"]
        assert configuration["lossless"]
        assert configuration["quality"] is None
        assert summary["identical"] == summary["compared"] == 9
        assert (summary["ar"] is None) == (configuration["name"] == "loop")
    assert "9 of 9" in result.out or "3 of 3" in result.out
    assert bench("--matrix", matrix(experiments=experiments, thresholds={"min_ar": 1.0}), model=False).code == 1


def test_options_go_before_the_matrix(bench, matrix):
    path = matrix(experiments=[{"name": "a", "gate": "always:3"}], batch=[4], new_tokens=3, repeats=1)
    assert bench("--matrix", path, "--batch", "2", model=False).code == 0
    settings = bench.document()["matrix"]
    assert (settings["batch"], settings["new_tokens"], settings["repeats"]) == ([2], 6, 3)
    assert bench("--matrix", path, "--gates", "never", model=False).code == 2


def test_modes_from_the_command_line(bench):
    assert (
        bench("--gates", "always:3", "--modes", "gated,lossless", "--draft-tokens", 2, "--quality-samples", 0).code == 0
    )
    names = [c["name"] for c in bench.document()["configurations"]]
    assert names == ["dense", "always:3", "lossless always:3"]
    assert bench.document()["configurations"][2]["speculative_config"]["num_speculative_tokens"] == 2
    assert "needs a gate" in bench("--modes", "lossless").err
    assert "Did you mean 'lossless'?" in bench("--modes", "losless", "--gates", "never").err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--engine", "graph"), 3, "needs a CUDA GPU"),
        (("--backend", "vllm"), 3, "vLLM is not installed"),
        (("--batch", "0"), 2, "--batch: 0 is not above 0"),
        (("--batch", "two"), 2, "'two' is not a number"),
        (("--prompt-lengths", "126"), 3, "exceed the model's 128 positions"),
        (("--draft-tokens", "3"), 2, "needs a lossless mode"),
        (("--baseline-url", "http://x"), 2, "--url"),
    ],
)
def test_what_cannot_be_done(bench, args, code, said):
    result = bench(*args)
    assert result.code == code
    assert said in result.err + result.out


@pytest.mark.parametrize(
    "command",
    [
        ("bench", "--shape", "qwen2.5-7b", "--engine", "graph"),
        ("bench", "--model", "{model}", "--engine", "graph"),
        ("generate", "--model", "{model}", "--engine", "graph", "--prompt", "the sea"),
        ("serve", "--model", "{model}", "--backend", "graph", "--port", "0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_engine_that_cannot_run_is_refused_before_a_model_is_made(
    sedac, tmp_path, monkeypatch, tiny_folder, command
):
    monkeypatch.chdir(tmp_path)
    for module, name in ((models, "load_model"), (models, "_from_pretrained"), (shapes, "shaped_model")):
        monkeypatch.setattr(module, name, lambda *args, **more: pytest.fail("a model was made"))
    result = sedac(*(part.format(model=tiny_folder) for part in command))
    assert result.code == 3
    assert result.err.startswith("error: the graph engine needs a CUDA GPU")
    assert ("--backend eager" if command[0] == "serve" else "--engine eager") in result.err


def test_json_is_the_document(bench):
    result = bench("--gates", "never", "--quality-samples", 0, "--json")
    assert result.json == bench.document()


def test_figures_so_far_survive_a_kill(bench, monkeypatch):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_judge_quality", interrupted)
    assert bench("--gates", "always:2").code == 130
    found = bench.document()
    assert not found["complete"]
    assert found["configurations"][1]["cells"]
    assert "did not finish" in (bench.folder / "report.md").read_text()


def test_prompts_of_a_file_and_random_ones(tiny, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('"the sea"\n{"prompt": "an old king ran"}\n')

    def work(**more):
        return Workload.of(make_matrix({"experiments": [{"name": "a"}], **more}, "m"), tiny.tokenizer, 0)

    assert work(prompts=str(path)).prompts(64, 3) == ["the sea", "an old king ran", "the sea"]
    assert len(tiny.tokenizer(work(prompts=str(path)).prompts(3, 2)[1])["input_ids"]) == 3
    assert work(prompts="synthetic").prompts(16, 2) == work(prompts="synthetic").prompts(16, 2)
    random = work(prompts="synthetic").prompts(16, 4)
    assert len(set(random)) == 4
    # A cache made for 16 must hold them: as drawn, tokens fall into more of them when their text is read again.
    assert all(0 < len(tiny.tokenizer(prompt)["input_ids"]) <= 16 for prompt in random)
    path.write_text('{"question": 1}\n')
    with pytest.raises(InputError, match="line 1: expected a string"):
        work(prompts=str(path))


def test_paused_skipping_is_the_stock_model(tiny):
    import torch

    ids = torch.arange(3, 15).unsqueeze(0)
    stock = tiny.model(ids).logits
    with skipping(tiny.model, "always:0", decoder=tiny.decoder) as run:
        run.paused = True
        assert torch.equal(tiny.model(ids).logits, stock)
        assert run.tokens == 0
        run.paused = False
        assert not torch.equal(tiny.model(ids).logits, stock)
        assert run.tokens == 12
