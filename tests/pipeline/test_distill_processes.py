"""Distillation spread over processes, and interrupted: the file ends as that of one process that was left alone."""

from __future__ import annotations

import pytest
import torch
from conftest import run_python

from sedac_cli.artifacts.gates_file import GatesFile
from sedac_cli.artifacts.tensors import load_tensors
from sedac_cli.pipeline.distill.train import Trainer

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

# The first process is interrupted in its fifth step, as by Ctrl-C; whoever launched them ends the others.
STOPPED = """
import os, sys
import sedac_cli.pipeline.distill.train as train
real = train.Trainer.compute
def compute(self, form, done):
    if self.step == 4 and self.world.main and "--resume" not in sys.argv:
        raise KeyboardInterrupt
    return real(self, form, done)
train.Trainer.compute = compute
from sedac_cli.__main__ import main
main(sys.argv[1:])
"""


@pytest.fixture
def args(tiny_folder, text_file):
    return ["distill", "--model", tiny_folder, "--dataset", text_file, "--max-length", 32, "--samples", 60, "--rank", 6,
            "--steps", 7, "--target-skip", 0.3, "--layers", "1,2,3", "--quiet"]  # fmt: skip


@pytest.fixture
def alone(tmp_path, args, sedac):
    result = sedac(*args, "--batch-size", 8, "--save", tmp_path / "alone.pth", "--json")
    assert result.code == 0, result.err
    return GatesFile.read(tmp_path / "alone.pth")


def assert_same(found: GatesFile, expected: GatesFile, tolerance: float) -> None:
    """Stand-ins are stored in bfloat16: two float32 numbers of one value may be rounded apart."""
    for kind, close in (("routers", tolerance), ("standins", max(tolerance, 2**-7) if tolerance else 0)):
        for layer, state in getattr(expected, kind).items():
            for name, value in state.items():
                torch.testing.assert_close(getattr(found, kind)[layer][name], value, rtol=close, atol=close)
    for mine, theirs in zip(found.curve, expected.curve, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4 if tolerance else 0)


def test_two_processes_train_what_one_trains(tmp_path, args, alone):
    (tmp_path / "run.py").write_text(STOPPED)
    pair = [*args, "--batch-size", 4, "--save", tmp_path / "pair.pth", "--json"]
    stopped = run_python(*LAUNCH, tmp_path / "run.py", *pair)
    assert stopped.code != 0
    assert not (tmp_path / "pair.pth").exists()
    assert load_tensors(tmp_path / "pair.training.pt")["step"] == 4
    result = run_python(*LAUNCH, tmp_path / "run.py", *pair, "--resume")
    assert result.code == 0, result.err
    assert result.json["steps"] == 7  # one document, of the first process
    found = GatesFile.read(tmp_path / "pair.pth")
    assert (found.recipe["processes"], found.recipe["tokens"]) == (2, alone.recipe["tokens"])
    assert_same(found, alone, 1e-4)
    left = sorted(path.name for path in tmp_path.iterdir() if "pair" in path.name)
    assert left == ["pair.pth"]


def test_interrupted_and_resumed_is_the_same_as_never_interrupted(tmp_path, args, alone, sedac, monkeypatch):
    real = Trainer.compute

    def interrupted(self, form, done):
        if self.step == 4:
            raise KeyboardInterrupt
        return real(self, form, done)

    mine = [*args, "--batch-size", 8, "--save", tmp_path / "mine.pth"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute", interrupted)
        assert sedac(*mine).code == 130
    torch.manual_seed(99)
    result = sedac(*mine, "--resume")
    assert result.code == 0, result.err
    assert_same(GatesFile.read(tmp_path / "mine.pth"), alone, 0)


def test_begun_with_another_batch(tmp_path, args, sedac, monkeypatch):
    def interrupted(self, form, done):
        raise KeyboardInterrupt

    mine = [*args, "--save", tmp_path / "mine.pth"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute", interrupted)
        assert sedac(*mine, "--batch-size", 8).code == 130
    result = sedac(*mine, "--batch-size", 4, "--resume")
    assert result.code == 3
    assert "batch_size was 8, now 4" in result.err


@pytest.mark.parametrize("kind", ["given", "ghost"])
def test_two_processes_train_the_other_kinds(tmp_path, args, sedac, kind):
    more = ["--gate", "stability:tau=0.6,k=1,min_layer=2,sinks=1"]
    if kind == "ghost":
        more = ["--ghost-kv", "--skip-layers", "1..2", "--gate", "random:0.5"]
    args = [*args[: args.index("--target-skip")], *more, "--quiet", "--json"]
    one = sedac(*args, "--batch-size", 8, "--save", tmp_path / "one.pth")
    assert one.code == 0, one.err
    two = run_python(*LAUNCH, "-m", "sedac_cli", *args, "--batch-size", 4, "--save", tmp_path / "two.pth")
    assert two.code == 0, two.err
    key = "standins" if kind == "given" else "maps"
    found, expected = (load_tensors(tmp_path / name)[key] for name in ("two.pth", "one.pth"))
    if kind == "given":
        found, expected = ({f"{x}.{k}": v for x, s in by.items() for k, v in s.items()} for by in (found, expected))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)
    assert two.json["tokens"] == one.json["tokens"]
