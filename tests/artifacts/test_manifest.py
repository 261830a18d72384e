"""The commit point: what it lists is there and unaltered, and it knows its model again."""

from __future__ import annotations

import json

import pytest
import torch

from sedac_cli.artifacts.files import sha256_file
from sedac_cli.artifacts.manifest import Manifest, ModelIdentity
from sedac_cli.errors import InputError, SedacError
from sedac_cli.pipeline.data import CollectedData


def test_a_collection_is_verified_whole(copied):
    manifest = Manifest.read(copied)
    for step in ("collect", "train-probes", "calibrate"):
        manifest.verify(copied, step)
    listed = set().union(*(step.files for step in manifest.steps.values()))
    assert listed == {p.name for p in copied.iterdir() if not p.name.startswith(".")} - {"manifest.json"}


@pytest.mark.parametrize(
    ("step", "name"),
    [("collect", "hidden_states_layer2.pt"), ("collect", "token_ids.pt"), ("train-probes", "sedac_probe_layer1.pth")],
)
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_file_is_named_with_both_digests(copied, step, name, damage):
    path = copied / name
    expected = sha256_file(path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-100:]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = sha256_file(path)
    with pytest.raises(InputError) as caught:
        Manifest.read(copied).verify(copied, step)
    assert str(path) in caught.value.message
    assert f"sha256 {found[:16]}..., expected {expected[:16]}..." in caught.value.message
    assert caught.value.hint == f"run `sedac {step}` again"


def test_a_missing_file_is_named(copied):
    (copied / "entropies_layer3.pt").unlink()
    with pytest.raises(InputError, match=r"entropies_layer3\.pt is missing"):
        CollectedData.open(copied)
    assert CollectedData.open(copied, [1, 2]).layers == (1, 2)  # what is not needed is not asked for


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d | {"schema_version": 2}, "schema version 2; this sedac reads 1"),
        (lambda d: d | {"extra": 1}, "damaged at 'extra'"),
        (lambda d: {k: v for k, v in d.items() if k != "model"}, "damaged at 'model'"),
        (lambda d: [d], "schema version None"),
        (lambda d: None, "not valid JSON"),
    ],
)
def test_a_damaged_manifest_is_refused(copied, edit, said):
    path = copied / "manifest.json"
    document = edit(json.loads(path.read_text()))
    path.write_text(path.read_text()[:-20] if document is None else json.dumps(document))
    with pytest.raises(InputError, match=r"manifest\.json") as caught:
        Manifest.read(copied)
    assert said in caught.value.message


def test_steps_that_were_not_run_and_folders_without_a_manifest(tmp_path, copied):
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        Manifest.read(tmp_path)
    manifest = Manifest.read(copied)
    del manifest.steps["train-probes"]
    manifest.write(copied)
    with pytest.raises(InputError, match="`sedac train-probes` has not been run there"):
        Manifest.read(copied).verify(copied, "train-probes")


def test_shapes_must_agree(copied):
    from sedac_cli.artifacts.tensors import save_tensors

    manifest = Manifest.read(copied)
    digest = save_tensors(copied / "entropies_layer1.pt", torch.zeros(5))
    manifest.steps["collect"].files["entropies_layer1.pt"] = digest
    manifest.write(copied)
    with pytest.raises(SedacError, match="layer 1 has 5 labels for 1536 tokens"):
        CollectedData.open(copied)


# Which model -------------------------------------------------------------------------------------------------


def identity(**changes) -> ModelIdentity:
    values = {
        "ref": "a",
        "architecture": {"hidden_size": 32, "num_hidden_layers": 4},
        "config_digest": "c",
        "tokenizer_digest": "t" * 64,
        "dtype": "float32",
        "weights_sample": [1.0, 0.5],
        "matrix_sample": [0.25, -0.125],
    }
    return ModelIdentity.model_validate(values | changes)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"architecture": {"hidden_size": 64, "num_hidden_layers": 4}}, "hidden_size is 32 there .a. and 64 here"),
        ({"tokenizer_digest": "u" * 64}, "another tokenizer: tttttttttttt there, uuuuuuuuuuuu here"),
        ({"weights_sample": [1.0, 0.6]}, "a weight is 0.5 there .a. and 0.6 here"),
        ({"matrix_sample": [0.25, 0.125]}, "a weight is -0.125 there .a. and 0.125 here"),
        ({"weights_sample": [1.0]}, "2 norm and bias weights in the sample there .a. and 1 here"),
    ],
)
def test_another_model_is_refused_naming_both_values(other, said):
    with pytest.raises(InputError, match=said):
        identity().require_same(identity(**other), "thresholds.json")


def test_the_same_model_in_another_precision_is_the_same():
    rounded = [float(torch.tensor(x).bfloat16()) for x in (1.003, 0.5013)]
    mine = identity(weights_sample=[1.003, 0.5013])
    mine.require_same(identity(ref="elsewhere", dtype="bfloat16", weights_sample=rounded), "x")
    mine.require_same(identity(weights_sample=rounded, matrix_sample=[], quantized=True), "x")
