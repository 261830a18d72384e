"""Commands as a GPU's owner gives them: what they say they ran in, and what they say when the machine or the model cannot."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import run_python, save_tiny, words

from sedac_cli import create_pipeline
from sedac_cli.config import ModelSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be captured here"),
]
TINY = ("--model", "builtin:tiny", "--dtype", "bfloat16")
SHORT = ("--prompt", "The sea was", "--max-new-tokens", 20, "--ignore-eos", "--json")


def test_generate_takes_the_graph_engine_unasked(sedac):
    unasked, named = (
        sedac("generate", *TINY, *SHORT, "--gate", "always:14", *more) for more in ((), ("--engine", "graph"))
    )
    eager = sedac("generate", *TINY, *SHORT, "--gate", "always:14", "--engine", "eager")
    assert [r.code for r in (unasked, named, eager)] == [0, 0, 0], (unasked.err, named.err, eager.err)
    assert unasked.json["engine"] == named.json["engine"] == {"name": "graph", "path": "fused", "notes": []}
    assert eager.json["engine"]["name"] == "eager"
    assert unasked.json["skip_ratio_decode"] == eager.json["skip_ratio_decode"] == 0.5
    assert unasked.json["texts"] == named.json["texts"]


def test_what_is_no_work_for_the_kernels_runs_the_models_own_code_and_is_eagers_text(sedac, tmp_path):
    args = ("generate", "--model", "builtin:tiny", "--dtype", "float32", *SHORT, "--gate", "always:14")
    graph, eager = sedac(*args, "--engine", "graph"), sedac(*args, "--engine", "eager")
    assert (graph.code, graph.json["engine"]["path"]) == (0, "generic"), graph.err
    assert graph.json["texts"] == eager.json["texts"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(words(3 + i % 5, i) for i in range(65)), encoding="utf-8")
    many = sedac("generate", *TINY, "--prompt-file", prompts, "--max-new-tokens", 6, "--engine", "graph", "--json")
    assert (many.code, many.json["engine"]["path"], len(many.json["texts"])) == (0, "generic", 65), many.err


@pytest.mark.parametrize("engine", ["auto", "eager", "graph"])
def test_a_prompt_too_long_for_the_model(sedac, tmp_path, engine):
    folder = save_tiny(tmp_path, max_position_embeddings=64, hidden_size=64)
    args = ("--model", folder, "--dtype", "bfloat16", "--prompt", words(40), "--max-new-tokens", 40, "--engine", engine)
    result = sedac("generate", *args)
    assert result.code == 3
    assert "exceed the model's 64 positions" in result.err
    assert result.out == ""


@pytest.mark.parametrize(("family", "config"), [("mistral", {"sliding_window": 8}), ("mixtral", {})])
def test_windows_and_experts_are_served_as_eager_serves_them_or_refused(sedac, tmp_path, family, config):
    folder = save_tiny(tmp_path, family, max_position_embeddings=256, **config)
    args = ("generate", "--model", folder, "--dtype", "float32", "--gate", "always:2", "--prompt", words(20),
            "--max-new-tokens", 12, "--ignore-eos", "--json", "--engine")  # fmt: skip
    eager, auto, named = (sedac(*args, engine) for engine in ("eager", "auto", "graph"))
    assert (eager.code, auto.code) == (0, 0), auto.err
    assert auto.json["texts"] == eager.json["texts"]
    if auto.json["engine"]["name"] == "graph":
        assert named.json["texts"] == eager.json["texts"]
    else:
        assert (named.code, named.out) == (3, "")
        assert "--engine eager" in named.err
        assert "the graph engine could not serve this" in auto.json["engine"]["notes"][0]


def test_a_bench_pairs_each_configuration_with_dense_in_its_own_engine(sedac, tmp_path, text_file):
    result = sedac(
        "bench", *TINY, "--dataset", text_file, "--gates", "always:14", "--modes", "gated,lossless", "--new-tokens", 16,
        "--prompt-lengths", 12, "--repeats", 1, "--warmup", 1, "--quality-samples", 2, "--save-dir", tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "bench.json").read_text())
    engines = {c["name"]: [cell["engine"] for cell in c["cells"]] for c in found["configurations"]}
    assert engines == {"dense": ["eager", "graph"], "always:14": ["graph"], "lossless always:14": ["eager"]}
    assert "eager" in found["baseline"] and "graph" in found["baseline"]  # noqa: PT018


def test_the_python_api_keeps_a_graph_engine():
    options = {"max_new_tokens": 16, "ignore_eos": True}
    model = ModelSpec("builtin:tiny", dtype="float32")
    graph, eager = create_pipeline(model, gate="always:14"), create_pipeline(model, gate="always:14", engine="eager")
    for prompt in ("The sea was", "A dog"):
        found, expected = graph(prompt, **options), eager(prompt, **options)
        assert found.text == expected.text
        assert found.skip_ratio == pytest.approx(expected.skip_ratio)
    assert (graph.used.name, eager.used.name) == ("graph", "eager")


# Machines that lack something ------------------------------------------------------------------------------------------

PRETEND = {
    "no CuPy": ("sys.modules['cupy'] = None", "pip install cupy-cuda"),
    "CuPy of another CUDA": (
        "cupy = types.ModuleType('cupy'); cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace("
        "runtimeGetVersion=lambda: 11080, driverGetVersion=lambda: 13000)); sys.modules['cupy'] = cupy",
        "CuPy is built for CUDA 11",
    ),
    "an old driver": ("import cupy; cupy.cuda.runtime.driverGetVersion = lambda: 12020", "this driver has 12.2"),
    "no cuda-bindings": ("sys.modules['cuda.bindings.driver'] = None", "cuda-bindings"),
}
TWICE = """
import contextlib, io, json, sys, types
{pretend}
from sedac_cli.__main__ import run
answers = []
for engine in ("graph", "auto"):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*{args!r}, "--engine", engine])
    answers.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""


@pytest.mark.parametrize("name", PRETEND)
def test_what_is_missing_is_said_and_auto_goes_on_without_it(name):
    pretend, says = PRETEND[name]
    args = [str(arg) for arg in ("generate", *TINY, *SHORT, "--gate", "always:14")]
    done = run_python("-c", TWICE.format(pretend=pretend, args=args))
    assert done.code == 0, done.err
    (code, out, err), (auto_code, auto_out, _) = json.loads(done.out)
    assert (code, out) == (3, ""), err
    assert says in err
    assert "Traceback" not in err
    used = json.loads(auto_out)["engine"]
    assert (auto_code, used["name"]) == (0, "eager")
    assert says in used["notes"][0]
