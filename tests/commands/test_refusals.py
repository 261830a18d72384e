"""What can be known to be wrong without a model is said before one is loaded; options that would do nothing are refused."""

from __future__ import annotations

import pytest

from sedac_cli import models


@pytest.fixture
def refused(sedac, monkeypatch, tmp_path):
    """The exit code and words of a command that must not come to load a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_from_pretrained", lambda *args: pytest.fail("a model was loaded"))

    def call(*args):
        result = sedac(*args, "--model", "builtin:tiny")
        assert "Traceback" not in result.err
        return result.code, result.err

    return call


SAYS = {
    "alwys:3": (2, "Did you mean 'always'?"),
    "always:three": (2, "'three' is not a number"),
    "always": (2, "needs an argument"),
    "random:1.5": (2, "a probability lies between 0 and 1"),
    "stability:tua=0.9,k=3": (2, "Did you mean 'tau'?"),
    "entropy:threshold=many": (2, "threshold"),
    "learned": (2, "gate 'learned' needs a file"),
    "cascade:nowhere.json": (3, "no such file: nowhere.json"),
    "learned:nowhere.pth@0.25": (3, "no such file: nowhere.pth"),
    "learned:nowhere.pth@much": (2, "'much' is not a share"),
    "ghost:": (2, "ghost K and V need a file"),
    "ghost:nowhere.pth@rndom:0.3": (2, "Did you mean 'random'?"),
}


@pytest.mark.parametrize("gate", SAYS)
def test_a_gate_that_no_model_could_have(refused, gate):
    code, said = SAYS[gate]
    found = refused("generate", "--prompt", "x", "--gate", gate)
    assert (found[0], said in found[1]) == (code, True), found


@pytest.mark.parametrize(
    "command",
    [
        ("serve", "--port", 0, "--backend", "eager", "--gate"),
        ("chat", "--gate"),
        ("validate", "--gate"),
        ("eval", "--tasks", "anything", "--gate"),
        ("bench", "--gates"),
    ],
)
def test_every_command_that_takes_a_gate_looks_first(refused, command):
    if command[0] == "eval":
        pytest.importorskip("lm_eval")
    code, said = refused(*command, "alwys:3")
    assert (code, "Did you mean 'always'?" in said) == (2, True), said


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--engine", "garph"), 2, "--engine: 'garph' is not known. Did you mean 'graph'?"),
        (("--engine", "graph", "--lossless", "--gate", "always:14"), 2, "lossless drafts run in the eager engine"),
        (("--engine", "graph", "--deep-threshold", 3), 2, "deep thinking runs tokens again"),
        (("--lossless", "--gate", "always:14", "--deep-threshold", 3), 2, "cannot be had together"),
        (("--adaptive", "1.2"), 2, "not between 0 and 1"),
        (("--deep-rounds", 2), 2, "above which entropy?"),
        (("--draft", "gate"), 2, "--draft is about drafts, which only --lossless makes"),
        (("--draft-tokens", 4), 2, "--draft-tokens is about drafts"),
        (("--no-adapt",), 2, "--no-adapt is about drafts"),
        (("--adapt",), 2, "--adapt is about drafts"),
        (("--lossless", "--draft", "ngrm"), 2, "Did you mean 'ngram'?"),
        (("--top-p", 0.9), 2, "--top-p is about drawing"),
        (("--top-k", 5), 2, "--top-k is about drawing"),
    ],
)
def test_what_does_not_go_together_in_generate(refused, args, code, says):
    found = refused("generate", "--prompt", "x", *args)
    assert (found[0], says in found[1]) == (code, True), found


def test_an_empty_prompt(refused, tmp_path):
    assert refused("generate", "--prompt", "x", "--prompt", "") == (
        3,
        "error: an empty prompt: there is nothing to continue\n",
    )
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "no prompt" in refused("generate", "--prompt-file", tmp_path / "empty.txt")[1]
    code, said = refused("bench", "--prompts", tmp_path / "empty.txt")
    assert (code, "holds no prompt" in said) == (3, True)
    assert "cannot read prompts" in refused("bench", "--prompts", tmp_path / "nowhere.txt")[1]


def test_probes_of_a_matrix_that_make_no_sense(refused, tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"experiments": [{"name": "a", "sedac_probe_layers": [1, 2], "sedac_thresholds": [1.0]}]}')
    code, said = refused("bench", "--matrix", path)
    assert (code, "1 sedac_thresholds for layers [1, 2]" in said) == (2, True)


def test_what_is_given_where_it_counts_is_taken(sedac, tiny_folder):
    words = ("generate", "-m", tiny_folder, "--prompt", "the sea", "--max-new-tokens", 3)
    assert sedac(*words, "--temperature", 0.8, "--top-p", 0.9, "--top-k", 5).code == 0
    drafts = ("--lossless", "--gate", "always:2", "--draft", "gate", "--draft-tokens", 2, "--no-adapt")
    assert sedac(*words, *drafts, "--engine", "eager").code == 0
