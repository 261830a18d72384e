"""The page: what it says is what the files say, it needs nothing but itself, and a browser shows it without complaint."""

from __future__ import annotations

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, look

from sedac_cli.report.sources import read_run
from sedac_cli.report.verdict import verdict


@pytest.fixture(scope="module")
def finished(collected, other_text, tiny_folder, tmp_path_factory):
    """A folder with probes, thresholds, validation, distilled gates and a benchmark. Not to be changed: copy it."""
    from sedac_cli.__main__ import run

    folder = Path(shutil.copytree(collected, tmp_path_factory.mktemp("report") / "run"))
    text = ["--dataset", other_text, "--samples", 8, "--max-length", 64]
    assert run([str(x) for x in ("validate", "--model", tiny_folder, "--data-dir", folder, *text, "-q")]) == 0
    distill = [
        "--steps",
        3,
        "--rank",
        4,
        "--batch-size",
        4,
        "--samples",
        30,
        "--max-length",
        32,
        "--dataset",
        other_text,
    ]
    save = folder / "sedac_gates.pth"
    assert run([str(x) for x in ("distill", "--model", tiny_folder, *distill, "--save", save, "-q")]) == 0
    (folder / "bench.json").write_text(json.dumps(BENCH))
    return folder


@pytest.fixture
def mine(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


CELL = {"label": "batch 1, prompt 64", "speedup": {"median": 1.2345, "low": 1.1, "high": 1.3, "n": 3},
        "tokens_per_second": {"median": 17.0, "low": 16.0, "high": 18.0}, "ttft_seconds": {"p50": 0.0123},
        "itl_seconds": {"p50": 0.004}, "floor": {"step_seconds": 0.0025, "share": {"median": 0.625}}}  # fmt: skip
BENCH = {
    "schema_version": 1, "kind": "sedac bench", "command": ["sedac", "bench", "--gates", "always:2"], "complete": True,
    "baseline": "the stock model", "missed": [], "random_weights": True, "machine": {"cpu": "a CPU", "gpus": []},
    "subject": {"read_bytes_per_second": 4.1e12},
    "matrix": {"base_model": "tiny"},
    "configurations": [
        {"name": "always:2", "status": "ok", "cells": [CELL], "errors": [],
         "quality": {"measures": {"ppl_ratio": 1.5, "agreement": 0.7, "skip_ratio": 0.5},
                     "intervals": {"ppl_ratio": [1.4, 1.6], "agreement": [0.6, 0.8]}}},
        {"name": "broken", "status": "crashed", "cells": [], "errors": [{"error": "no such <gate>"}], "quality": None},
    ],
}  # fmt: skip


def text_of(page: Path) -> str:
    """What a reader reads."""
    source = page.read_text()
    body = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", source, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def facts_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="facts">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found.group(1))


def test_the_page_says_what_the_files_say(sedac, mine):
    result = sedac("report", mine, "--json")
    assert result.code == 0, result.err
    assert result.json["tokens"] == "new"
    assert result.json["missing"] == []
    read = text_of(mine / "report.html")
    report = json.loads((mine / "validate.json").read_text())["report"]
    for key in ("ppl_ratio", "agreement", "kl"):
        assert f"{report['measures'][key]:.4f}" in read
    assert f"{report['measures']['skip_ratio']:.1%}" in read
    assert "No quality was promised" in read
    assert "weights of this model are random" in read
    for row in report["bins"]["dense entropy"]:
        assert row["bin"] in read
        assert f"{row['agreement']:.4f}" in read
    assert "1.234x (1.100 .. 1.300)" in read or "1.235x (1.100 .. 1.300)" in read
    assert "crashed: no such <gate>" in read
    assert "sedac bench --gates always:2" in read
    assert "a CPU" in read
    assert "2.500 ms 62.5%" in read
    assert "at the 4.10 TB/s" in read
    assert read.count("sedac calibrate") == 0  # nothing is missing

    tokens = json.loads((mine / "tokens.json").read_text())
    facts = facts_of(mine / "report.html")["tokens"]
    assert [(f[0], f[1], f[7]) for f in facts] == [
        (t["skipped"], t["exit_layer"], t["layers"]) for t in tokens["tokens"]
    ]
    assert len(facts) == 128  # as long as the model can read


def test_it_needs_nothing_but_itself(sedac, mine):
    assert sedac("report", mine).code == 0
    source = (mine / "report.html").read_text()

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.wants, self.ids = [], []

        def handle_starttag(self, tag, attributes):
            for name, value in attributes:
                if name in ("src", "href", "action", "srcset", "xlink:href") and not str(value).startswith("#"):
                    self.wants.append(f"{tag} {name}={value}")
                if name == "id":
                    self.ids.append(value)

    reader = Reader()
    reader.feed(source)
    assert reader.wants == []
    assert len(reader.ids) == len(set(reader.ids))
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", source)
    assert source.count("<svg") == 6
    for reference in re.findall(r'(?:url\(|href=")#([^")]+)', source):
        assert reference in reader.ids


def test_text_is_text_not_markup(sedac, mine):
    evil = "the </script><script>document.title='bad'</script> & <b>sea</b> {{ 7*7 }} was grey"
    result = sedac("report", mine, "--text", evil, "--tokens", 200)
    assert result.code == 0, result.err
    source = (mine / "report.html").read_text()
    assert "<script>document" not in source
    heat = re.search(r'<div class="heat"[^>]*>(.*?)</div>', source, re.DOTALL).group(1)
    assert html.unescape(re.sub(r"<[^>]*>", "", heat)) == evil


def test_the_heat_map_is_the_runtimes_own_decisions(sedac, mine, tiny):
    from sedac_cli.runtime.plan import make_plan
    from sedac_cli.runtime.skip import skipping

    words = "the sea was grey and an old king ran to the hill in the wind"
    assert sedac("report", mine, "--text", words).code == 0
    found = json.loads((mine / "tokens.json").read_text())["tokens"]
    plan = make_plan(f"cascade:{mine / 'thresholds.json'}", tiny.decoder)
    inputs = tiny.tokenizer(words, return_tensors="pt")
    with skipping(tiny.model, plan.gate, plan.standin, keep_passes=True) as run:
        logits = tiny.model(**inputs).logits[0]
    assert [t["skipped"] for t in found] == run.passes[0].skipped[0].tolist()
    assert [t["exit_layer"] for t in found] == run.passes[0].exit_layer[0].tolist()
    assert sum(t["skipped"] for t in found) > 0
    assert all(t["layers"].count("1") == t["skipped"] for t in found)
    assert "".join(t["text"] for t in found) == words
    p = logits.softmax(-1)
    ids = inputs["input_ids"][0].tolist()
    assert found[0]["p"] is None
    for i in range(1, len(ids)):
        assert found[i]["p"] == pytest.approx(float(p[i - 1, ids[i]]), rel=1e-2)
    for token in found:
        at = token["exit_layer"]
        if at < 4:
            limits = dict(zip(plan.gate.checkpoints, plan.gate.limits.tolist(), strict=True))
            assert token["values"][str(at)] < limits[at]


def test_it_is_drawn_again_without_the_model(sedac, mine):
    assert sedac("report", mine, "--tokens", 50).code == 0
    before = (mine / "tokens.json").read_bytes()
    again = sedac("report", mine, "--redraw", "--json")
    assert (again.code, again.json["tokens"]) == (0, "kept")
    assert sedac("report", mine, "--json").json["tokens"] == "kept"
    assert (mine / "tokens.json").read_bytes() == before

    document = json.loads((mine / "thresholds.json").read_text())
    document["thresholds"] = [0.0, 0.0, 0.0]
    (mine / "thresholds.json").write_text(json.dumps(document))
    assert sedac("report", mine, "--json").json["tokens"] == "new"  # another gate: the old map would lie
    assert all(t["skipped"] == 0 for t in json.loads((mine / "tokens.json").read_text())["tokens"])


def test_a_model_out_of_reach(sedac, mine, tmp_path):
    manifest = json.loads((mine / "manifest.json").read_text())
    manifest["model"]["ref"] = str(tmp_path / "gone")
    (mine / "manifest.json").write_text(json.dumps(manifest))
    result = sedac("report", mine)
    assert result.code == 0
    assert "no model folder" in result.err
    read = text_of(mine / "report.html")
    assert "token by token: no model folder" in read
    asked = sedac("report", mine, "--model", tmp_path / "gone")
    assert asked.code == 3


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        ("validate.json", "sedac validate"),
        ("sedac_gates.pth", "sedac distill"),
        ("bench.json", "sedac bench"),
        ("manifest.json", ""),
        ("thresholds.json", ""),
    ],
)
def test_what_is_not_there_is_said_with_the_command_that_makes_it(sedac, mine, remove, says):
    (mine / remove).unlink()
    result = sedac("report", mine, "--redraw")
    assert result.code == 0, result.err
    assert says in text_of(mine / "report.html")
    assert says in result.err


@pytest.mark.parametrize(
    "name", ["validate.json", "bench.json", "thresholds.json", "manifest.json", "sedac_gates.pth", "tokens.json"]
)
@pytest.mark.parametrize("damage", [b"", b'{"report": 1, "configurations": 3, "tokens": [{}]}'])
def test_a_damaged_file_costs_its_part_not_the_page(sedac, mine, name, damage):
    (mine / name).write_bytes(damage)
    result = sedac("report", mine, "--redraw", "--json")
    assert result.code == 0, result.err
    assert result.json["problems"]
    assert "How to make it again" in text_of(mine / "report.html")


def test_a_folder_of_a_benchmark_alone(sedac, tmp_path):
    """Its quality, its layers and its limits are on the page."""
    bench = json.loads(json.dumps(BENCH))
    bench["matrix"]["thresholds"] = {"max_ppl_ratio": 1.6, "min_agreement": None, "min_ar": 0.9}
    first = bench["configurations"][0]
    first["summary"] = {"ppl_ratio": 1.5}
    first["cells"] = [CELL | {"skip_ratio_per_layer": [0.0, 0.0, 1.0, 1.0]}]

    def page_of(document):
        (tmp_path / "bench.json").write_text(json.dumps(document))
        assert sedac("report", tmp_path, "--redraw").code == 0
        return text_of(tmp_path / "report.html"), (tmp_path / "report.html").read_text()

    read, source = page_of(bench | {"crashed": []})
    assert "The benchmark's limits held" in read
    assert "ppl ratio at most 1.6" in read
    assert "acceptance" not in read  # nothing drafted: that limit was about nothing
    assert "bench: always:2 50.0% - 1.5000 1.4000 .. 1.6000 0.7000" in read
    assert "share of tokens that skip the MLP, by layer and configuration" in source
    for change in ({"crashed": ["broken"]}, {"complete": False}):
        assert "limits held" not in page_of(bench | change)[0]
    missed = [{"configuration": "always:2", "what": "ppl ratio", "found": 1.5, "limit": 1.4, "where": ""}]
    assert "A limit was missed" in page_of(bench | {"missed": missed})[0]


@pytest.mark.parametrize("known", [True, False])
def test_a_benchmark_of_a_server_knows_a_name_and_no_more(sedac, tmp_path, known):
    subject = {"model": "fake" if known else None, "engine": "server", "device": None, "dtype": None}
    (tmp_path / "bench.json").write_text(json.dumps(BENCH | {"subject": subject}))
    result = sedac("report", tmp_path, "--redraw", "--json")
    assert (result.code, result.json["problems"]) == (0, [])
    assert ("model fake" in text_of(tmp_path / "report.html")) == known


def test_the_steps_of_a_run_are_on_the_page(sedac, mine):
    step = {"finished": True, "options": {"argv": ["--save-dir=a folder", "--layers=7,14"]}}
    (mine / "run.json").write_text(json.dumps({"steps": {"collect": step, "report": {"finished": False}}}))
    result = sedac("report", mine, "--redraw", "--json")
    assert (result.code, result.json["problems"]) == (0, [])
    assert "sedac collect '--save-dir=a folder' --layers=7,14" in text_of(mine / "report.html")


def test_every_gate_is_told_in_words():
    from sedac_cli.gates.registry import GATES
    from sedac_cli.report.explain import gate_sentence

    assert all(gate_sentence(name) for name in GATES)


def test_folders_with_nothing(sedac, tmp_path):
    assert sedac("report", tmp_path / "no").code == 3
    result = sedac("report", tmp_path)
    assert result.code == 3
    assert "nothing to report" in result.err
    assert not (tmp_path / "report.html").exists()
    assert sedac("report", tmp_path, "--redraw", "--gate", "never").code == 2


@pytest.mark.parametrize(("kept", "status", "headline"), [(True, "kept", "held"), (False, "broken", "broken")])
def test_the_verdict_is_the_checks(mine, kept, status, headline):
    document = json.loads((mine / "validate.json").read_text())
    document["report"]["promise"] = {
        "harm": "agreement >= 0.98", "promise": "on average over sequences", "confidence": 0.95, "limit": 0.98,
        "calibrated": 0.985, "measured": 0.981, "interval": [0.979, 0.983], "sequences": 400, "clipped_above": 0,
        "kept": kept,
    }  # fmt: skip
    (mine / "validate.json").write_text(json.dumps(document))
    run = read_run(mine)
    found = verdict(run)
    assert found.status == status
    assert headline in found.headline
    assert "0.9810 (95 % interval 0.9790 .. 0.9830) over 400 sequences" in found.sentences[1]
    run.bench["missed"] = [{"configuration": "a", "what": "ppl ratio", "found": None, "limit": 1.01, "where": ""}]
    assert verdict(run).status == "broken"
    assert "not measured, limit 1.01" in verdict(run).sentences[-1]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_in_a_browser(sedac, mine, tmp_path, width, dark):
    assert sedac("report", mine, "--tokens", 120).code == 0
    seen = look(mine / "report.html", tmp_path, width, dark)
    told = seen.told
    assert seen.console == []
    assert told["overflow"] == 0
    assert told["outside"] == []
    assert (sum(map(int, re.findall(r"\d+", told["background"])[:3])) < 200) == dark
    assert told["tokens"] == 120
    assert all(200 < svg < width for svg in told["svgs"])
    tokens = json.loads((mine / "tokens.json").read_text())["tokens"]
    for tip, token in zip(told["tips"], tokens, strict=False):
        assert not tip["hidden"]
        assert tip["right"] <= width
        assert (tip["cells"], tip["on"]) == (4, token["skipped"])
        assert f"{token['skipped']} of 4 MLPs skipped" in tip["text"]
        assert f"{token['entropy']:.2f} bits" in tip["text"]
        assert "risk" in tip["text"]
    assert told["left"]
    assert told["shown"]
    assert told["keys"] == [0, 1, 119, 118]
    assert told["escaped"]
    assert told["touched"]  # a lifted finger leaves what it tapped
    assert told["elsewhere"]
    assert told["cells"] == 0  # no figure hides at the side
    modes = dict(told["modes"])
    assert list(modes) == ["skip", "early", "bits", "changed"]
    assert len(set(modes.values())) >= 3  # the colours follow the choice
    assert seen.picture.stat().st_size > 20_000


def test_a_shape_without_weights_is_not_sent_to_have_its_quality_measured(sedac, tmp_path):
    for model, told in (("shape:qwen2.5-0.5b", False), ("tiny", True)):
        (tmp_path / "bench.json").write_text(json.dumps(BENCH | {"matrix": {"base_model": model}}))
        result = sedac("report", tmp_path)
        assert result.code == 0, result.err
        read = text_of(tmp_path / "report.html")
        assert "1.23" in read
        for command in ("sedac validate", "sedac distill", "sedac calibrate"):
            assert (command in read, command in result.err + result.out) == (told, told), (model, command)
