"""`thresholds.json` says exactly what it may say, and belongs to its probes and its model."""

from __future__ import annotations

import json
import math

import pytest

from sedac_cli.artifacts.thresholds import Thresholds
from sedac_cli.errors import InputError
from sedac_cli.gates.registry import gate_from_thresholds
from sedac_cli.structure import Decoder


def edited(folder, change):
    path = folder / "thresholds.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def test_written_values_come_back_exactly(copied):
    found = Thresholds.read(copied / "thresholds.json")
    again = copied / "again.json"
    found.write(again)
    assert Thresholds.read(again) == found
    assert list(found.by_layer) == [1, 2, 3]
    assert found.guards.sinks == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(extra=1), "extra: Extra inputs"),
        (lambda d: d["promise"].update(extra=1), "promise.extra: Extra inputs"),
        (lambda d: d["guards"].update(sink=1), "guards.sink: Extra inputs"),
        (lambda d: d["guards"].update(sinks=-1), "guards.sinks"),
        (lambda d: d.update(thresholds=[1.0, 2.0]), "differ in number"),
        (lambda d: d.update(layers=[1, 2, 5]), r"layers \[1, 2, 5\] but probes for \[1, 2, 3\]"),
        (lambda d: d.update(layers=[2, 1, 3]), "but probes for"),
        (lambda d: d["thresholds"].__setitem__(1, math.nan), "finite numbers"),
        (lambda d: d["thresholds"].__setitem__(1, math.inf), "finite numbers"),
        (lambda d: d["thresholds"].__setitem__(1, -0.5), "finite numbers"),
        (lambda d: d["thresholds"].__setitem__(1, None), "thresholds.1"),
        (lambda d: d.update(gate="cascad"), "gate"),
        (lambda d: d.update(batch_rule="mean"), "batch_rule"),
        (lambda d: d.pop("model"), "model"),
        (lambda d: d.update(schema_version=2), "schema version 2; this sedac reads 1"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused(copied, change, said):
    with pytest.raises(InputError, match=said):
        Thresholds.read(edited(copied, change))


def test_another_probe_is_refused_with_both_digests(copied, tiny: Decoder):
    probe = copied / "sedac_probe_layer2.pth"
    probe.write_bytes((copied / "sedac_probe_layer1.pth").read_bytes())
    found = Thresholds.read(copied / "thresholds.json")
    with pytest.raises(InputError, match=r"layer2\.pth is not the probe .*sha256 [0-9a-f]{16}\.\.\., expected"):
        gate_from_thresholds(found, copied, tiny.decoder)
    probe.unlink()
    with pytest.raises(InputError, match=r"layer2\.pth is missing"):
        gate_from_thresholds(found, copied, tiny.decoder)
