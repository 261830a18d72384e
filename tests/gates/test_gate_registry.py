"""Specs: what users write becomes the gate they meant, or an error that says what was wrong."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from gate_helpers import random_probe

from sedac_cli.artifacts.files import sha256_file
from sedac_cli.artifacts.manifest import ModelIdentity
from sedac_cli.artifacts.thresholds import Thresholds
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Guards
from sedac_cli.gates.lens import HeadLens, ProbeLens
from sedac_cli.gates.options import REQUIRED
from sedac_cli.gates.registry import GATES, build_gate
from sedac_cli.probes import probe_name
from sedac_cli.structure import find_decoder


@pytest.fixture(scope="module")
def decoder():
    return find_decoder(tiny_model(num_hidden_layers=8))


@pytest.fixture
def write(tmp_path):
    """A thresholds file with its probes at layers 2 and 5."""
    for layer in (2, 5):
        torch.save(random_probe(32, layer).state_dict(), tmp_path / probe_name(layer))

    def make(gate="soft", **more):
        document = {
            "gate": gate,
            "layers": [2, 5],
            "thresholds": [0.8, 1.3],
            "probes": {
                n: {"file": probe_name(n), "sha256": sha256_file(tmp_path / probe_name(n))} for n in (2, 5)
            },
            "guards": {"sinks": 4},
            "target_label": "entropy",
            "found_by": {},
            "promise": {"kind": "exit-rate", "target": {}},
            "model": ModelIdentity(
                ref="x", architecture={}, config_digest="", tokenizer_digest="", dtype="", weights_sample=[]
            ),
        } | more  # fmt: skip
        path = tmp_path / "thresholds.json"
        Thresholds(**document).write(path)
        return path

    return make


def test_stability_from_its_spec(decoder):
    gate = build_gate("stability:tau=0.9, k=2,min_layer=3,sinks=4", decoder)
    assert gate.parameters() == {"tau": 0.9, "k": 2, "min_layer": 3}
    assert gate.guards == Guards(sinks=4)
    assert build_gate("stability", decoder).parameters() == {"tau": 0.95, "k": 3, "min_layer": 4}
    assert build_gate("stability:sinks=4", decoder, guards=Guards(last=1)).guards == Guards(last=1)


def test_entropy_from_its_spec(decoder, write):
    folder = write().parent
    gate = build_gate("entropy:mean=6.5,sd=2,threshold=0.3", decoder)
    assert gate.checks == [5]
    assert isinstance(gate.lens, HeadLens)
    assert gate.guards == Guards(sinks=4, first=2, last=1)
    gate = build_gate(f"entropy:mean=6/5,sd=2,threshold=0.3,checks=2/5,min_exit_layer=2,lens={folder}", decoder)
    assert isinstance(gate.lens, ProbeLens)
    assert gate.parameters()["mean"] == [6.0, 5.0]
    assert gate.parameters()["sd"] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stabilty:tau=0.9", "Did you mean 'stability'"),
        ("stability:tua=0.9", "no option 'tua'. Did you mean 'tau'"),
        ("stability:tau=1.5", "tau=1.5 is out of range"),
        ("stability:tau=nan", "tau=nan is out of range"),
        ("stability:k=2.5", "k=2.5 is not a whole number"),
        ("stability:tau=high", "tau=high is not a number"),
        ("stability:tau", "'tau' is not of the form key=value"),
        ("stability:tau=", "'tau=' is not of the form key=value"),
        ("stability:k=2,k=3", "names 'k' twice"),
        ("stability:min_layer=99", "layer 99 does not exist, the model has layers 0..7"),
        ("entropy", "needs mean and sd"),
        ("entropy:mean=6", "needs sd"),
        ("entropy:mean=6,sd=0", "sd=0 is out of range"),
        ("entropy:mean=6,sd=1,anchor_intervall=2", "no option 'anchor_intervall'. Did you mean 'anchor_interval'"),
        ("entropy:mean=6/5/4,sd=1,threshold=0.3", "3 values of mean for 1 checks"),
        ("entropy:mean=6,sd=1,checks=5/77", "layer 77 does not exist"),
        ("entropy:mean=6,sd=1,lens=nowhere", "a folder of probes"),
        ("soft", "gate 'soft' needs an argument"),
        ("never:3", "takes no argument"),
        ("random:1.5", "between 0 and 1"),
    ],
)
def test_what_is_wrong_is_said(decoder, spec, message):
    with pytest.raises(UsageError) as error:
        build_gate(spec, decoder)
    assert message in error.value.message


def test_soft_from_its_file(decoder, write):
    gate = build_gate(f"soft:{write(parameters={'decay': 0.5, 'weights': [1, 2]})}", decoder)
    assert gate.parameters() == {
        "checkpoints": [2, 5], "thresholds": pytest.approx([0.8, 1.3]), "decay": 0.5, "weights": [1.0, 2.0], "floor": 0.2,
    }  # fmt: skip
    assert gate.guards == Guards(sinks=4)


def test_files_without_parameters_are_valid_as_before(decoder, write):
    path = write(gate="cascade")
    text = path.read_text()
    path.write_text(text.replace('"parameters": {},', ""))
    assert '"parameters"' in text
    assert '"parameters"' not in path.read_text()
    assert build_gate(f"cascade:{path}", decoder).thresholds == pytest.approx({2: 0.8, 5: 1.3})


def test_adaptive_from_a_file_or_by_hand(decoder, write):
    path = write(gate="cascade", parameters={"adaptive": {"rates": [0.2, 0.6], "alpha": 0.1}})
    gate = build_gate(f"cascade:{path}", decoder)
    assert gate.parameters()["adaptive"] == {
        "rates": [0.2, 0.6], "calibration_steps": 50, "alpha": 0.1, "window": 256,
    }  # fmt: skip
    own = AdaptiveThresholds({2: 0.1, 5: 0.1})
    assert build_gate(f"cascade:{path}", decoder, adaptive=own).adaptive is own
    with pytest.raises(UsageError, match="no thresholds to adapt"):
        build_gate("stability", decoder, adaptive=own)


@pytest.mark.parametrize(
    ("gate", "parameters", "message"),
    [
        ("soft", {"decya": 0.5}, "Did you mean 'decay'"),
        ("soft", {"decay": 2}, "decay=2 is out of range"),
        ("cascade", {"decay": 0.5}, "no option 'decay'"),
        ("cascade", {"adaptive": {"rates": [0.2]}}, "1 adaptive rates for 2 layers"),
        ("cascade", {"adaptive": {"rates": [0.2, "many"]}}, "rates=many is not a number"),
        ("cascade", {"adaptive": {"rates": [0.2, 0.5], "alpah": 1}}, "Did you mean 'alpha'"),
        ("cascade", {"adaptive": [0.2, 0.5]}, "adaptive is list"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(decoder, write, gate, parameters, message):
    with pytest.raises((UsageError, InputError)) as error:
        build_gate(f"{gate}:{write(gate=gate, parameters=parameters)}", decoder)
    assert message in error.value.message


def test_every_gate_describes_itself():
    for name, gate in GATES.items():
        assert gate.name == name
        assert gate.summary
        assert gate.form.partition(":")[0] == name
        for option in gate.options:
            assert option.meaning
            assert option.range
            if option.default not in (REQUIRED, None):
                assert option.check(option.default, name) == option.default
