"""The command line as a shell meets it: what is imported, which value wins, what goes to stdout, how it ends."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from conftest import python, run_python

COMMANDS = ["collect", "train-probes", "calibrate", "validate", "generate", "eval", "bench", "demo", "doctor"]
HEAVY = ("torch", "transformers", "datasets", "numpy", "accelerate")


def imported_after(*args: str, modules: tuple[str, ...]) -> list[str]:
    code = f"""
import sys
from sedac_cli.__main__ import run
code = run({list(args)!r})
assert code == 0, code
print([m for m in {modules!r} if m in sys.modules], file=sys.stderr)
"""
    result = run_python("-c", code)
    assert result.code == 0, result.err
    assert "Usage" in result.out
    return json.loads(result.err.strip().splitlines()[-1].replace("'", '"'))


def test_help_imports_nothing_heavy():
    assert imported_after("--help", modules=(*HEAVY, "pydantic")) == []


def test_help_of_every_command_imports_no_torch():
    code = f"""
import sys
from sedac_cli.__main__ import run
for command in {COMMANDS!r}:
    assert run([command, "--help"]) == 0
print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)
"""
    result = run_python("-c", code)
    assert result.code == 0
    assert result.out.count("--quiet") == len(COMMANDS)
    assert result.err.strip() == "[]"


# Which value wins --------------------------------------------------------------------------------------------


@pytest.fixture
def spy(monkeypatch):
    """What `collect` would have been called with."""
    calls = []

    def collect(options, model, text, progress=None):
        from sedac_cli.pipeline.collect import CollectReport

        calls.append((options, model, text))
        return CollectReport(options.save_dir, {}, 0, 0, 0, "bits", {}, 0.0, 0.0)

    monkeypatch.setattr("sedac_cli.pipeline.collect.collect", collect)
    return calls


def test_precedence_is_command_line_environment_yaml_default(sedac, spy, tmp_path):
    yaml = tmp_path / "sedac.yaml"
    yaml.write_text("samples: 11\nmax-length: 12\nbatch_size: 13\n")
    env = {"SEDAC_COLLECT_SAMPLES": "21", "SEDAC_COLLECT_MAX_LENGTH": "22"}
    assert sedac("collect", "--config", yaml, "--samples", 31, env=env).code == 0
    options, model, text = spy[-1]
    assert (text.samples, text.max_length, options.batch_size) == (31, 22, 13)
    assert options.target == "final"
    assert model.ref == "Qwen/Qwen2.5-3B-Instruct"


def test_yaml_sections_lists_and_flags(sedac, spy, tmp_path):
    yaml = tmp_path / "sedac.yaml"
    yaml.write_text("""
layers: [1, 2]
collect:
  layers: [3, 5, 9]
  pack: false
  model: builtin:tiny
  revision: 2024-01-01
train-probes:
  epochs: 3
calibrate:
""")
    assert sedac("collect", "--config", yaml).code == 0
    options, model, text = spy[-1]
    assert options.layers == (3, 5, 9)
    assert text.pack is False
    assert model.revision == "2024-01-01"
    yaml.write_text("layers: 4\nshuffle: no")
    assert sedac("collect", env={"SEDAC_COLLECT_CONFIG": str(yaml)}).code == 0
    assert spy[-1][0].layers == (4,)
    assert spy[-1][2].shuffle is False


def test_a_prompt_is_one_value_wherever_it_comes_from(sedac, monkeypatch, tmp_path):
    seen = []

    def read(prompts, file):
        seen.append(prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr("sedac_cli.commands.generate.read_prompts", read)
    yaml = tmp_path / "sedac.yaml"
    yaml.write_text('prompt: ["one, two", three]')
    sedac("generate", "--config", yaml)
    sedac("generate", "--config", yaml, env={"SEDAC_GENERATE_PROMPT": "four five"})
    sedac("generate", "--prompt", "six", env={"SEDAC_GENERATE_PROMPT": "four five"})
    assert seen == [["one, two", "three"], ["four five"], ["six"]]


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ("sampels: 3", 2, "Did you mean 'samples'?"),
        ("colect: {samples: 3}", 2, "Did you mean 'collect'?"),
        ("collect: {sampels: 3}", 2, "Did you mean 'samples'?"),
        ("samples: abc", 2, "--samples"),
        ("samples: true", 2, "--samples"),
        ("samples: 1.5", 2, "--samples"),
        ("samples: 0", 2, "--samples"),
        ("pack: perhaps", 2, "--pack"),
        ("layers: {a: 1}", 2, "layers: expected a value or a list of values"),
        ("layers: [3, x]", 2, "'x' is not a number"),
        ("layers: [3, [4]]", 2, "layers: expected a value or a list of values"),
        ("layers: [9, 3]", 2, "--layers must rise"),
        ("layers: [3, 3]", 2, "twice"),
        ("- samples", 3, "found list"),
        ("samples: [1", 3, "not valid YAML"),
    ],
)
def test_nonsense_in_yaml_is_refused(sedac, spy, tmp_path, content, code, said):
    yaml = tmp_path / "sedac.yaml"
    yaml.write_text(content)
    result = sedac("collect", "--config", yaml)
    assert result.code == code
    assert said in result.err.replace("\n", " ")
    assert "Traceback" not in result.err
    assert result.out == ""
    assert not spy


def test_missing_yaml_file(sedac):
    result = sedac("collect", "--config", "nowhere.yaml")
    assert (result.code, result.err.startswith("error: no such file: nowhere.yaml")) == (3, True)


@pytest.mark.parametrize(
    "env",
    [{"SEDAC_COLLECT_SAMPLES": "many"}, {"SEDAC_COLLECT_LAYERS": "a,b"}, {"SEDAC_COLLECT_TARGET": "finl"}],
)
def test_nonsense_in_the_environment_is_wrong_usage(sedac, spy, env):
    result = sedac("collect", env=env)
    assert (result.code, result.out) == (2, "")
    assert not spy


def test_a_variable_named_version_prints_no_version(sedac):
    assert "Usage" in sedac("--help", env={"SEDAC_VERSION": "1.2.3"}).out


# How it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["colect"], ["collect", "--sampels", "3"], ["collect", "extra"], ["generate"]])
def test_wrong_usage(sedac, args):
    result = sedac(*args)
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "option", ["--samples=0", "--max-length=1", "--seed=-1", "--target=nix", "--layers=", "--layers=-1"]
)
def test_values_out_of_range(sedac, spy, option):
    assert sedac("collect", option).code == 2
    assert not spy


def test_a_users_mistake_shows_a_traceback_only_under_debug(sedac, tmp_path):
    mistake = ("generate", "--model", "builtin:nix", "--prompt", "x")
    plain = sedac(*mistake)
    assert plain.code == 3
    assert plain.err.splitlines() == ["error: there is no built-in model 'nix'", "  try: built in: builtin:tiny"]
    assert "Traceback" in sedac(*mistake, "--debug").err
    assert "Traceback" in sedac(*mistake, env={"SEDAC_GENERATE_DEBUG": "1"}).err
    assert "Traceback" not in sedac(*mistake).err


def test_a_fault_of_ours_is_70(sedac, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("by zero\nsecond line")

    monkeypatch.setattr("sedac_cli.doctor.examine", broken)
    result = sedac("doctor")
    assert result.code == 70
    assert result.err.splitlines()[0] == "internal error: ZeroDivisionError: by zero"
    assert "Traceback" not in result.err
    assert "Traceback" in sedac("doctor", "--debug").err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. 9 GiB.\nmore"), "out of GPU memory on this machine: CUDA out of memory. 9 GiB."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "out of memory on this machine: DefaultCPU"),
        (MemoryError(), "out of memory on this machine: no size is told"),
    ],
)  # fmt: skip
def test_memory_that_runs_out_is_the_machine_s_state(sedac, monkeypatch, error, says):
    def full(*args):
        raise error

    def wrapped(*args):
        try:
            full()
        except Exception as cause:
            raise RuntimeError("the library says something else") from cause

    monkeypatch.setattr("sedac_cli.doctor.examine", full)
    result = sedac("doctor")
    assert (result.code, result.err.startswith(f"error: {says}")) == (3, True)
    assert "--load-in-4bit" in result.err
    monkeypatch.setattr("sedac_cli.doctor.examine", wrapped)
    assert sedac("doctor").code == 3


def test_a_closed_pipe_is_no_failure():
    doctor = "import sedac_cli.doctor as d; d.examine = list; from sedac_cli.__main__ import main; main(['doctor', '--json'])"
    for args in (["-c", doctor], ["-m", "sedac_cli", "--help"]):
        process = python(*args)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_ctrl_c_in_mid_collect_says_how_to_resume(tmp_path, tiny_folder, text_file):
    args = ["collect", "--model", tiny_folder, "--dataset", text_file, "--layers", "1,2"]
    args += ["--max-length", "16", "--samples", "500", "--batch-size", "1", "--save-dir", tmp_path / "out"]
    process = python(
        "-c",
        "import sys, time, sedac_cli.pipeline.collect as c\n"
        "real = c._Collection.run_batch\n"
        "c._Collection.run_batch = lambda *a: (time.sleep(0.02), print('batch', file=sys.stderr, flush=True), real(*a))[2]\n"
        "from sedac_cli.__main__ import main\n"
        "main(sys.argv[1:])",
        *args,
        "--quiet",
    )
    for _ in range(5):
        assert process.stderr.readline() == "batch\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert out == ""
    assert [p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")] == []
    journal = (tmp_path / "out" / ".partial" / "rank0.journal").read_text().splitlines()
    assert len(journal) >= 4  # what was done before the interrupt is kept


# What goes where ---------------------------------------------------------------------------------------------


def test_json_is_the_only_thing_on_stdout(sedac, tmp_path, tiny_folder, text_file, other_text):
    data = ("--data-dir", tmp_path / "d")
    model = ("--model", tiny_folder)
    size = ("--samples", 12, "--max-length", 32)
    steps = {
        "collect": (*model, "--dataset", text_file, *size, "--layers", "1,2", "--save-dir", tmp_path / "d"),
        "train-probes": (*data, "--epochs", 1, "--rank", 4),
        "calibrate": data,
        "validate": (*model, *data, "--dataset", other_text, *size),
        "generate": (*model, "--prompt", "the sea", "--max-new-tokens", 3, "--gate", "always:2", "--show", "exits"),
        "doctor": (),
    }
    for command, args in steps.items():
        result = sedac(command, *args, "--json")
        assert result.code == 0, (command, result.err)
        assert isinstance(result.json, dict)
        quiet = sedac(command, *args, "--quiet", *(["--overwrite"] if command == "collect" else []))
        assert quiet.code == 0
        assert quiet.err == "", command
        assert quiet.out != ""
    missed = sedac("validate", *steps["validate"], "--max-ppl-ratio", 0, "--min-agreement", 1, "--json")
    assert missed.code == 1
    assert missed.json["measures"]["ppl_ratio"] > 0
    assert "limit missed: ppl ratio" in missed.err
    assert "agreement" in missed.err


def test_json_stays_empty_when_there_is_no_result(sedac):
    result = sedac("train-probes", "--data-dir", "nowhere", "--json")
    assert (result.code, result.out) == (3, "")
    assert "nowhere" in result.err


def test_help_answers_soon():
    began = time.monotonic()
    assert run_python("-m", "sedac_cli", "--help").code == 0
    assert time.monotonic() - began < 5  # a fuse; the benchmark measures it


def test_only_names_of_the_hub_are_asked_for_there(tmp_path, monkeypatch):
    from sedac_cli.hub import go_offline_if_unreachable, is_hub_ref

    assert is_hub_ref("Qwen/Qwen2.5-3B-Instruct")
    assert is_hub_ref("wikitext")
    assert not any(map(is_hub_ref, ["builtin:tiny", "./model", "~/model", str(tmp_path)]))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")  # the discard port: nobody answers
    go_offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
