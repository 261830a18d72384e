"""`sedac run`: every step once, again only where something it depends on has changed, and a report at the end."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from conftest import python, words

STEPS = ["collect", "train-probes", "calibrate", "validate", "report"]


def config(model, text, other, **changes):
    document = {
        "model": str(model), "max-length": 48,
        "collect": {"dataset": str(text), "samples": 10, "layers": [1, 2, 3]},
        "train-probes": {"epochs": 2, "rank": 4, "batch-size": 256},
        "calibrate": {"target-exit-rate": [0.2, 0.3, 0.4]},
        "validate": {"dataset": str(other), "samples": 6},
        "report": {"tokens": 40},
    }  # fmt: skip
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            document[section.replace("_", "-")] = (document[section.replace("_", "-")] or {}) | {key: value}
        elif value is None:
            document.pop(section.replace("_", "-"))
        else:
            document[section.replace("_", "-")] = value
    return document


@pytest.fixture
def started(tmp_path, tiny_folder, text_file, other_text, sedac):
    """A function: write the YAML with these changes, run it, and say which steps were done and which were kept."""

    class Runner:
        folder = tmp_path / "run"
        file = tmp_path / "pipeline.yaml"
        text = text_file
        steps = {}  # noqa: RUF012

        def write(self, **changes):
            self.file.write_text(yaml.safe_dump(config(tiny_folder, self.text, other_text, **changes)))

        def __call__(self, *arguments, code=0, **changes):
            self.write(**changes)
            result = sedac("run", self.file, "--save-dir", self.folder, "--json", *arguments)
            assert result.code == code, result.err
            self.result = result
            if result.out:
                self.steps = {step["name"]: step for step in result.json["steps"]}
            return [name for name, step in self.steps.items() if not step["kept"]]

        def state(self):
            return json.loads((self.folder / "run.json").read_text())["steps"]

        def files(self):
            return {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in self.folder.iterdir() if p.is_file()}

    return Runner()


def test_all_steps_then_none(started):
    assert started() == STEPS
    report = (started.folder / "report.html").read_text()
    measured = json.loads((started.folder / "validate.json").read_text())["report"]["measures"]
    assert started.steps["validate"]["result"]["measures"] == measured
    assert f"{measured['ppl_ratio']:.4f}" in report
    assert set(started.state()["train-probes"]["outputs"]) == {f"sedac_probe_layer{x}.pth" for x in (1, 2, 3)}
    before, results = started.files(), {n: s["result"] for n, s in started.steps.items()}
    assert started() == []
    assert started.files() == before
    assert {n: s["result"] for n, s in started.steps.items()} == results


def test_what_changes_is_done_again_with_what_depends_on_it(started, sedac):
    started()
    assert started(validate__samples=5) == ["validate", "report"]
    assert started.steps["validate"]["result"]["sequences"] == 5
    assert started(validate__samples=5, calibrate__sinks=2) == ["calibrate", "validate", "report"]
    (started.folder / "sedac_probe_layer2.pth").unlink()
    again = started(validate__samples=5, calibrate__sinks=2)
    assert again[0] == "train-probes"
    assert "collect" not in again
    assert started("--force", "train-probes", validate__samples=5, calibrate__sinks=2)[0] == "train-probes"
    assert started("--seed", "3", validate__samples=5, calibrate__sinks=2)[0] == "collect"
    text = started.file.read_text()
    shown = sedac("run", started.file, "--save-dir", started.folder, "--seed", 3)
    assert shown.out.count("kept") == 5
    assert "ppl ratio" in shown.out
    assert started.file.read_text() == text


def test_text_that_changes_is_collected_again(started, tmp_path, text_file):
    started.text = Path(shutil.copy(text_file, tmp_path / "mine.txt"))
    started()
    started.text.write_text(started.text.read_text() + "\n<|endoftext|>\n" + words(300, 77))
    assert started()[0] == "collect"
    started.text.touch()
    assert started() == []  # another time, the same content


def test_an_altered_result_is_made_again(started):
    started()
    path = started.folder / "thresholds.json"
    document = json.loads(path.read_text())
    document["thresholds"] = [0.0, 0.0, 0.0]
    path.write_text(json.dumps(document))
    assert started() == ["calibrate"]  # it gives the same file again, so nothing that reads it has changed
    assert json.loads(path.read_text())["thresholds"] != [0.0, 0.0, 0.0]


def test_a_missed_limit_ends_in_1_after_the_report_and_stays_missed(started):
    started(code=1, **{"validate__max-ppl-ratio": 0.5})
    assert "validate: limit missed" in started.result.err
    assert (started.folder / "report.html").is_file()
    before = started.files()
    started(code=1, **{"validate__max-ppl-ratio": 0.5})
    assert [s["kept"] for s in started.steps.values()] == [True] * 5
    assert started.files() == before
    assert started() == ["validate", "report"]


def test_distilled_gates_are_certified_and_checked(started, other_text):
    changes = {"collect": None, "train-probes": None, "distill": {"dataset": str(started.text), "steps": 3, "rank": 4,
               "batch-size": 4, "samples": 30, "target-skip": 0.25}}  # fmt: skip
    assert started(calibrate=None, **changes) == ["distill", "validate", "report"]
    assert started.steps["validate"]["result"]["gate"] == "learned"
    assert started.steps["validate"]["result"]["reality"]["mlp_skip_ratio"] > 0
    certify = {"calibrate": {"max-harm": "agreement=0.2", "dataset": str(started.text), "samples": 30}}
    assert started(**changes, **certify) == ["calibrate", "validate", "report"]
    assert started.steps["validate"]["result"]["promise"]["kept"] is True
    assert "The promise held" in (started.folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train_probes__epocs": 3}, "Did you mean 'epochs'"),
        ({"trian": {"epochs": 1}}, "'trian' is neither a step nor an option"),
        ({"collect__save_dir": "x"}, "'save_dir' is not an option here"),
        ({"train_probes__epochs": "many"}, "train-probes"),
        ({"train_probes__epochs": 0}, "train-probes"),
        ({"collect__layers": {"a": 1}}, "expected a value"),
        ({"validate": 3}, "validate: expected options"),
        ({"validate__gate": "always:1", "validate__thresholds": "x.json"}, None),
    ],
)
def test_nonsense_is_refused_before_anything_is_done(started, changes, says):
    if says is None:  # what only the command itself can know ends the run there, with what was finished kept
        started(code=2, **changes)
        assert "two" in started.result.err or "each name a gate" in started.result.err
        assert started() == ["validate", "report"]
        return
    started(code=2, **changes)
    assert says in started.result.err
    assert not started.folder.exists()


def test_files_that_are_no_pipeline(sedac, tmp_path):
    file = tmp_path / "x.yaml"
    assert sedac("run", file).code == 3
    for text, code in (
        ("a: [", 3),
        ("- 1", 3),
        ("", 3),
        ("model: builtin:tiny", 2),
        ("report: {}", 2),
        ("seed: -1\ncollect: {}", 2),
    ):
        file.write_text(text)
        assert sedac("run", file, "--save-dir", tmp_path / "r").code == code, text
    assert not (tmp_path / "r").exists()


def test_other_peoples_folders_are_left_alone(started, copied, sedac):
    before = {p.name for p in copied.iterdir()}
    started.folder = copied
    started(code=3)
    assert "not a run's" in started.result.err
    assert {p.name for p in copied.iterdir()} == before
    (copied / "run.json").write_text(json.dumps({"schema_version": 1, "owner": "demo", "steps": {}, "files": {}}))
    started(code=3)
    assert "sedac demo" in started.result.err


def test_a_benchmark_is_measured_once_and_again_when_its_matrix_changes(started, tmp_path):
    """The gate that distill made is measured; its file is an earlier step's, a matrix is a source."""
    work = {"prompt-lengths": [8], "new-tokens": 3, "repeats": 2, "quality-samples": 2, "dataset": str(started.text)}
    without = {"collect": None, "train-probes": None, "calibrate": None, "validate": None}
    distill = {"dataset": str(started.text), "steps": 2, "rank": 4, "batch-size": 4, "samples": 20, "target-skip": 0.25}
    assert started(**without, distill=distill, bench=work) == ["distill", "bench", "report"]
    dense, own = started.steps["bench"]["result"]["configurations"]
    assert (dense["name"], own["name"].partition(":")[0]) == ("dense", "learned")
    assert own["summary"]["speedup"] > 0
    assert f"{own['summary']['speedup']:.3f}x" in (started.folder / "report.html").read_text()
    assert started(**without, distill=distill, bench=work) == []
    matrix = tmp_path / "m.json"
    matrix.write_text(json.dumps({"experiments": [{"name": "two", "gate": "always:2"}]}))
    told = work | {"matrix": str(matrix), "max-ppl-ratio": 0.5}
    assert started(code=1, **without, distill=distill, bench=told) == ["bench", "report"]
    assert "bench: limit missed: two: ppl ratio" in started.result.err
    started(code=1, **without, distill=distill, bench=told)
    assert [step["kept"] for step in started.steps.values()] == [True] * 3
    matrix.write_text(json.dumps({"experiments": [{"name": "three", "gate": "always:3"}]}))
    assert started(code=1, **without, distill=distill, bench=told) == ["bench", "report"]


def test_an_unknown_step_is_not_forced(started):
    started("--force", "calibrat", code=2)
    assert "Did you mean 'calibrate'" in started.result.err


def test_a_killed_run_goes_on_and_ends_in_the_same_files(started, tmp_path):
    big = {"collect__samples": 60, "collect__batch-size": 1}
    started.write(**big)
    process = python("-m", "sedac_cli", "run", started.file, "--save-dir", started.folder, "-q")
    end = time.monotonic() + 100
    while (
        not list((started.folder / ".partial").glob("*.journal")) and process.poll() is None and time.monotonic() < end
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not started.state()["collect"]["finished"]
    assert started(**big) == STEPS
    mine = started.state()
    started.folder = tmp_path / "clean"
    started(**big)
    for step in ("collect", "train-probes", "calibrate"):
        assert started.state()[step]["outputs"].keys() == mine[step]["outputs"].keys()
    assert started.state()["collect"]["outputs"] == mine["collect"]["outputs"]
