"""Whole engines with what vLLM can do around a gate: compiled graphs and their cache, speculation, caching, tensor parallel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, save_tiny
from vllm_helpers import PROMPTS, SIZE, hugging_face, save_gates, save_probes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ENGINE = {
    "dtype": "float32", "max_model_len": 256, "gpu_memory_utilization": 0.2, "seed": 0, "max_num_seqs": 8,
    "max_num_batched_tokens": 256, "enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from sedac_cli.models import load_model

    folder = save_tiny(tmp_path_factory.mktemp("engines") / "tiny", "qwen2", **SIZE)
    loaded = load_model(str(folder))
    probes = folder.parent / "probes"
    probes.mkdir()
    save_probes(probes, loaded, PROMPTS, layers=(1, 2), share=0.4)
    return loaded, folder, probes


def offline(
    folder: Path,
    sedac=None,
    environment=None,
    prompts=PROMPTS,
    tokens=8,
    force=(None,),
    metrics=False,
    join_norms=False,
    **engine,
):
    """What `offline.py` answers."""
    values = ENGINE | {"model": str(folder)} | engine
    if sedac is not None:
        values["additional_config"] = {"sedac": sedac}
    options = {
        "engine": values, "prompts": prompts, "tokens": tokens, "force": list(force), "gated": sedac is not None,
        "metrics": metrics, "join_norms": join_norms,
    }  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline.py")), json.dumps(options)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path} | (environment or {}), timeout=600, cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith('{"rounds"')][-1])


def expected(model, spec, prompts=PROMPTS, tokens=8):
    from sedac_cli.runtime.plan import make_plan

    loaded = model[0]
    new, _, run = hugging_face(loaded, make_plan(spec, loaded.decoder, loaded.identity), prompts, tokens)
    return new, run


def test_a_compile_cache_of_a_run_without_the_plugin_does_not_disable_it(model, tmp_path):
    """Three runs over one cache: plain, gated, plain again. The second must skip; the third must find the first's graph."""
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    compiled = {"enforce_eager": False}
    plain = offline(model[1], environment=cache, **compiled)
    keys = cached_graphs(tmp_path / "cache")
    assert keys, "nothing was compiled: this test would show nothing"
    gated = offline(model[1], {"gate": "always:1"}, environment=cache, **compiled)
    assert gated["rounds"][0] == expected(model, "always:1")[0] != plain["rounds"][0]
    status = gated["status"][0]
    assert status["skipped"] == [0] + [status["tokens"]] * 3
    assert cached_graphs(tmp_path / "cache") > keys
    keys = cached_graphs(tmp_path / "cache")
    assert offline(model[1], environment=cache, **compiled)["rounds"] == plain["rounds"]
    assert cached_graphs(tmp_path / "cache") == keys


def cached_graphs(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.glob("torch_compile_cache/*/*") if path.is_dir()}


DRAFTS = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    "suffix": {"method": "suffix", "num_speculative_tokens": 3},
}


@pytest.mark.parametrize("drafts", DRAFTS)
def test_speculation_prefix_caching_and_chunked_prefill(model, drafts):
    """All at once, on prompts that repeat themselves and share their beginnings; verified drafts are decode, not prefill."""
    if drafts == "suffix":
        pytest.importorskip(
            "arctic_inference.suffix_decoding", reason="suffix needs arctic-inference", exc_type=ImportError
        )
    _, folder, probes = model
    motif = [11, 90, 200, 33, 8, 41]
    prompts = [motif * 12, [*motif * 12, 5, 6], [*motif * 6, 77], [7]]
    spec = f"cascade:{probes}/thresholds.json"
    found = offline(
        folder, {"gate": spec}, prompts=prompts, tokens=24, force=(None, None), metrics=True, enable_prefix_caching=True, block_size=32,
        max_num_batched_tokens=32, max_num_seqs=4,
        speculative_config=DRAFTS[drafts],
    )  # fmt: skip
    want, _ = expected(model, spec, prompts, 24)
    assert found["rounds"] == [want, want]  # the second round reads the first one's prefixes
    assert found["metrics"]["vllm:spec_decode_num_draft_tokens"] > 20
    assert found["metrics"]["vllm:prefix_cache_hits"] > 32
    status = found["status"][0]
    assert 0 < status["skip_ratio"] < 1
    exits, skipped = status["exits"], status["skipped"]
    assert [sum(exits[: layer + 1]) for layer in range(4)] == skipped


@pytest.mark.parametrize("how", ["small", "itself"])
def test_a_draft_model_is_left_as_it_is(model, tmp_path, how):
    """Two models in one worker: the target alone is gated and counted, and what it says is what it says without speculation.
    `small`: another shape, eager. `itself`: the same weights ungated, so exactly the same layers, compiled with one cache."""
    from sedac_cli.vllm.handshake import read_reports, require_workers

    _, folder, probes = model
    spec = f"cascade:{probes}/thresholds.json"
    shape = SIZE | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    draft = save_tiny(tmp_path / "draft", "qwen2", seed=1, **shape) if how == "small" else folder
    reports, cache = tmp_path / "reports", tmp_path / "cache"
    environment = {
        "SEDAC_HANDSHAKE_DIR": str(reports), "VLLM_CACHE_ROOT": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_CPU_CI_ENV": "1" if how == "small" else "0",
    }  # fmt: skip
    found = offline(
        folder, {"gate": spec}, environment, tokens=24, metrics=True, enforce_eager=how == "small",
        speculative_config={"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2},
    )  # fmt: skip
    want, _ = expected(model, spec, tokens=24)
    assert found["rounds"][0] == want
    (status,) = found["status"]
    require_workers(read_reports(reports), 1, status["digest"])
    assert status["layers"] == [0, 1, 2, 3]
    assert 0 < status["skip_ratio"] < 1
    spent = {name: int(value) for name, value in found["metrics"].items()}
    verified = spent["vllm:spec_decode_num_drafts"] + spent["vllm:spec_decode_num_draft_tokens"]
    accepted = spent["vllm:spec_decode_num_accepted_tokens"]
    assert len(PROMPTS) * 23 == spent["vllm:spec_decode_num_drafts"] + accepted, (
        "a step without a draft, or one too many"
    )
    assert status["tokens"] == sum(map(len, PROMPTS)) + verified
    assert how == "small" or accepted > 0  # the draft is the dense model: it agrees now and then


def test_two_ranks_decide_alike(model):
    """Tensor parallel over gloo: the all-reduce inside a skipped MLP is left out on both ranks or on none."""
    _, folder, probes = model
    spec = f"cascade:{probes}/thresholds.json"
    found = offline(folder, {"gate": spec}, tensor_parallel_size=2, environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    want, run = expected(model, spec)
    assert found["rounds"][0] == want
    assert [status["rank"] for status in found["status"]] == [0, 1]
    for status in found["status"]:
        assert status["skipped"] == run.skipped_per_layer
        assert status["tokens"] == found["status"][0]["tokens"]


def test_two_pipeline_stages_gate_their_own_layers(model, tmp_path):
    """Two layers each: routers, stand-ins and counters of the second stage are those of layers 2 and 3, not of 0 and 1.
    Compiled, since vLLM 0.32 on the CPU makes a later stage's buffers only while it warms up what it has compiled."""
    loaded, folder, _ = model
    save_gates(tmp_path / "gates.pth", loaded)
    spec = f"learned:{tmp_path}/gates.pth@0.4"
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_CI_ENV": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = offline(folder, {"gate": spec}, environment, pipeline_parallel_size=2, enforce_eager=False)
    want, run = expected(model, spec)
    assert found["rounds"][0] == want
    first, second = found["status"]
    assert [first["rank"], second["rank"]] == [0, 1]
    assert (first["gated"], second["gated"]) == ([1], [2, 3])
    assert (first["layers"], second["layers"]) == ([0, 1], [2, 3])
    assert first["tokens"] == second["tokens"]
    assert [a + b for a, b in zip(first["skipped"], second["skipped"], strict=True)] == run.skipped_per_layer
    assert first["skipped"][2:] == [0, 0]
    assert second["skipped"][:2] == [0, 0]


# Refused where the engine is configured, before anything is loaded: no engine runs ------------------------------------


def configured(folder: Path, engine=None, **sedac):
    from vllm.engine.arg_utils import EngineArgs

    from sedac_cli.vllm.plugin import register

    register()
    arguments = ENGINE | {"model": str(folder), "additional_config": {"sedac": sedac}} | (engine or {})
    return EngineArgs(**arguments).create_engine_config()


def test_settings_reach_the_configuration(model):
    config = configured(model[1], gate="always:2")
    assert config.additional_config["sedac"]["gate"] == "always:2"
    other = configured(model[1], gate="always:3")
    plain = configured(model[1], enabled=False)
    assert len({config.compute_hash(), other.compute_hash(), plain.compute_hash()}) == 3
    assert configured(model[1], gate="always:2").compute_hash() == config.compute_hash()


def test_artifacts_that_do_not_fit_are_refused(model, tmp_path):
    import shutil

    import torch

    from sedac_cli.errors import InputError, UsageError
    from sedac_cli.models import load_model
    from sedac_cli.probes import probe_name

    _, folder, probes = model
    other = load_model(str(save_tiny(tmp_path / "other", "qwen2", **SIZE | {"intermediate_size": 256})))
    (tmp_path / "others").mkdir()
    save_probes(tmp_path / "others", other, PROMPTS, layers=(1, 2), share=0.4)
    narrow = load_model(str(save_tiny(tmp_path / "narrow", "qwen2")))
    (tmp_path / "narrow_probes").mkdir()
    save_probes(tmp_path / "narrow_probes", narrow, PROMPTS, layers=(1, 2), share=0.4)
    broken = Path(shutil.copytree(probes, tmp_path / "broken"))
    state = torch.load(broken / probe_name(2), weights_only=True)
    state["head.weight"][0, 0] = float("nan")
    torch.save(state, broken / probe_name(2))

    def cascade(where):
        return {
            "probe_dir": str(where), "probe_layers": [1, 2], "adaptive": False, "thresholds": [0.5, 0.5],
        }  # fmt: skip

    assert configured(folder, **cascade(probes)).additional_config["sedac"]["probe_layers"] == [1, 2]
    for settings, error, words in (
        ({"gate": f"cascade:{tmp_path}/others/thresholds.json"}, InputError, "intermediate_size is 256"),
        (cascade(tmp_path / "narrow_probes"), InputError, "32.*128|128.*32"),
        (cascade(broken), InputError, "NaN|finite"),
        (cascade(tmp_path / "nowhere"), InputError, "no folder"),
        (cascade(probes) | {"probe_layers": [1, 3]}, InputError, "layer3"),
        ({"gate": "always:9"}, UsageError, "always:9"),
        ({"gate": "entropy:mean=4,sd=1,min_exit_layer=1"}, UsageError, "output head"),
        ({"gate": "newest"}, UsageError, "newest"),
    ):
        with pytest.raises(error, match=words):
            configured(folder, **settings)
    with pytest.raises(InputError, match="pipeline"):
        configured(folder, {"pipeline_parallel_size": 2}, **cascade(probes))


def test_a_switch_of_this_environment_is_read_and_an_older_one_refused(model, tmp_path, monkeypatch):
    """What `sedac patch` writes, for the Python that runs these tests."""
    import vllm

    from sedac_cli.artifacts.files import write_json
    from sedac_cli.errors import InputError
    from sedac_cli.vllm.plugin import register
    from sedac_cli.vllm.switch import Switch, user_place

    register()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("SEDAC_ENABLED", raising=False)
    path = user_place(Path(sys.prefix))
    path.parent.mkdir()

    def plain():
        from vllm.engine.arg_utils import EngineArgs

        return EngineArgs(**ENGINE, model=str(model[1])).create_engine_config().additional_config

    write_json(path, Switch(path, "0.1.0", vllm.__version__, {"gate": "always:1"}, True).document())
    assert plain()["sedac"]["gate"] == "always:1"
    monkeypatch.setenv("SEDAC_ENABLED", "0")
    assert "sedac" not in plain()
    monkeypatch.delenv("SEDAC_ENABLED")
    write_json(path, Switch(path, "0.1.0", "0.1.2", {"gate": "always:1"}, True).document())
    with pytest.raises(InputError, match=r"0\.1\.2"):
        plain()
    path.unlink()
    assert "sedac" not in plain()
