"""What `collect` writes equals a brute-force pass of transformers, token by token; bad input is set aside or refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import run_python, save_tiny, tiny_tokenizer, words
from transformers import AutoModelForCausalLM

from sedac_cli.artifacts.tensors import read_tensor
from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError, UsageError
from sedac_cli.models import load_model
from sedac_cli.pipeline.collect import CollectOptions, collect
from sedac_cli.pipeline.data import CollectedData

LAYERS = (0, 2, 3)


@pytest.fixture(scope="module")
def reference(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Documents of very different lengths, so that nearly every batch is padded."""
    path = tmp_path_factory.mktemp("text") / "lines.jsonl"
    documents = [words(1 + n * n % 23, n) for n in range(30)] + ["x"]
    path.write_text("\n".join(json.dumps({"text": d}) for d in documents))
    return path


def distribution(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def entropy_bits(logits: torch.Tensor) -> torch.Tensor:
    log_p = distribution(logits)
    return -(log_p.exp() * log_p).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


@torch.no_grad()
def brute_force(model, ids: list[int], target: str):
    """Hidden states and labels of one unpadded sample, from full logits in float64."""
    batch = torch.tensor([ids])
    out = model(batch, output_hidden_states=True)
    states = {layer: out.hidden_states[layer][0] for layer in LAYERS}
    labels = {}
    for layer in LAYERS:
        if target == "final":
            labels[layer] = entropy_bits(out.logits[0])
        elif target == "lens":
            labels[layer] = entropy_bits(model.lm_head(model.model.norm(states[layer])))
        else:
            handles = [
                block.mlp.register_forward_hook(lambda m, a, o: torch.zeros_like(o))
                for block in model.model.layers[layer:]
            ]
            skipped = distribution(model(batch).logits[0])
            for handle in handles:
                handle.remove()
            dense = distribution(out.logits[0])
            labels[layer] = (dense.exp() * (dense - skipped)).sum(-1)
    return states, labels


@pytest.mark.parametrize("target", ["final", "lens", "harm"])
@pytest.mark.parametrize("pack", [True, False])
def test_files_equal_a_brute_force_pass(tmp_path, tiny_folder, reference, lines, target, pack):
    text = TextSpec(str(lines), samples=25, max_length=40, pack=pack)
    options = CollectOptions(layers=LAYERS, save_dir=tmp_path / "d", target=target, batch_size=4)
    report = collect(options, ModelSpec(str(tiny_folder)), text)
    samples = list(Corpus(text, tiny_tokenizer()).samples())
    data = CollectedData.open(tmp_path / "d")
    assert data.token_ids.tolist() == [token for sample in samples for token in sample]
    assert data.sequence_ids.tolist() == [n for n, sample in enumerate(samples) for _ in sample]
    assert data.positions().tolist() == [p for sample in samples for p in range(len(sample))]
    assert (report.tokens, report.sequences, report.set_aside) == (data.tokens, len(samples), 0)
    assert pack or len({len(sample) for sample in samples}) > 5
    expected = [brute_force(reference, sample, target) for sample in samples]
    for layer in LAYERS:
        states = torch.cat([s[layer] for s, _ in expected])
        labels = torch.cat([x[layer] for _, x in expected])
        torch.testing.assert_close(data.states[layer], states, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(data.labels[layer].double(), labels, rtol=1e-3, atol=2e-4)
        assert labels.std() > 0.01  # there is something to compare
        assert report.label_mean[layer] == pytest.approx(labels.mean().item(), rel=1e-3)
    assert torch.load(tmp_path / "d/hidden_states_layer2.pt", weights_only=True, mmap=True).dtype == torch.float32


def test_final_labels_are_the_same_file_for_every_layer(collected):
    first, *others = [read_tensor(collected / f"entropies_layer{layer}.pt") for layer in (1, 2, 3)]
    assert all(torch.equal(first, other) for other in others)


def test_batches_do_not_change_what_is_collected(tmp_path, tiny_folder, lines):
    text = TextSpec(str(lines), samples=25, max_length=40, pack=False)
    for size in (1, 8):
        options = CollectOptions(layers=(2,), save_dir=tmp_path / str(size), batch_size=size)
        collect(options, ModelSpec(str(tiny_folder)), text)
    one, eight = (CollectedData.open(tmp_path / name) for name in ("1", "8"))
    assert torch.equal(one.token_ids, eight.token_ids)
    torch.testing.assert_close(one.states[2], eight.states[2], rtol=1e-4, atol=1e-4)


def test_the_precision_of_the_model_is_the_precision_of_the_states(tmp_path, tiny_folder, text_file):
    text = TextSpec(str(text_file), samples=8, max_length=32)
    options = CollectOptions(layers=(1,), save_dir=tmp_path / "half")
    collect(options, ModelSpec(str(tiny_folder), dtype="bfloat16"), text)
    data = CollectedData.open(tmp_path / "half")
    assert data.states[1].dtype == torch.bfloat16
    assert data.labels[1].dtype == torch.float32
    full = load_model(ModelSpec(str(tiny_folder)))
    sample = torch.tensor([data.token_ids[:32].tolist()])
    expected = full.model(sample, output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(data.states[1][:32].float(), expected, rtol=0.1, atol=0.1)


def test_manifest_says_how_it_was_made(collected, tiny_folder, text_file):
    manifest = json.loads((collected / "manifest.json").read_text())
    step = manifest["steps"]["collect"]
    assert step["settings"]["layers"] == [1, 2, 3]
    assert step["settings"]["text"]["dataset"] == str(text_file)
    assert step["summary"]["tokens"] == 24 * 64
    assert {"torch", "transformers", "sedac"} <= set(step["versions"])
    assert manifest["model"]["ref"] == str(tiny_folder)
    assert manifest["model"]["architecture"]["num_hidden_layers"] == 4


# Not finite --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nan_folder(tmp_path_factory):
    """A model whose embedding of "q" is NaN."""
    token = tiny_tokenizer()("q")["input_ids"][0]

    def spoil(model):
        model.model.embed_tokens.weight[token] = float("nan")

    return save_tiny(tmp_path_factory.mktemp("models") / "nan", change=spoil)


def documents_with_nan(path, count, bad):
    rows = [words(5 + n % 7, n) + (" q here" if n in bad else "") for n in range(count)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return TextSpec(str(path), samples=count, max_length=32, pack=False, shuffle=False)


def test_a_sample_with_nan_is_set_aside_alone(tmp_path, nan_folder, caplog):
    text = documents_with_nan(tmp_path / "a.jsonl", 120, {42})
    report = collect(CollectOptions(layers=(1, 2), save_dir=tmp_path / "d"), ModelSpec(str(nan_folder)), text)
    assert (report.sequences, report.set_aside) == (119, 1)
    data = CollectedData.open(tmp_path / "d")
    assert sorted(set(range(120)) - set(data.sequence_ids.tolist())) == [42]
    assert all(torch.isfinite(x).all() for x in (*data.states.values(), *data.labels.values()))
    assert data.manifest.steps["collect"].summary["set_aside"] == [42]
    assert "sample 42" in caplog.text


@pytest.mark.parametrize("asked", [120, 10_000])
def test_more_than_a_percent_of_nan_fails(tmp_path, nan_folder, asked):
    """Of the samples there are, not of the number that was asked for."""
    from dataclasses import replace

    text = replace(documents_with_nan(tmp_path / "a.jsonl", 120, {42, 77}), samples=asked)
    with pytest.raises(
        InputError, match=f"2 of {min(asked, 120)} samples gave NaN or infinite hidden states, more than 1%"
    ):
        collect(CollectOptions(layers=(1,), save_dir=tmp_path / "d"), ModelSpec(str(nan_folder)), text)
    assert [p for p in (tmp_path / "d").iterdir() if not p.name.startswith(".")] == []


# Options -----------------------------------------------------------------------------------------------------


def test_layers_that_do_not_exist(tmp_path, tiny_folder, text_file):
    options = CollectOptions(layers=(1, 4), save_dir=tmp_path / "d")
    with pytest.raises(UsageError, match=r"layer 4 does not exist, .* has layers 0\.\.3"):
        collect(options, ModelSpec(str(tiny_folder)), TextSpec(str(text_file)))


def test_text_without_samples_leaves_nothing(tmp_path, tiny_folder, sedac):
    (tmp_path / "a.txt").write_text("\n")
    result = sedac(
        "collect", "--model", tiny_folder, "--dataset", tmp_path / "a.txt", "--layers", 1, "--save-dir", tmp_path / "d"
    )
    assert result.code == 3
    assert "gave no sample" in result.err
    assert [p for p in (tmp_path / "d").iterdir() if not p.name.startswith(".")] == []


# Memory ------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.pipeline.collect import CollectOptions, collect
model, out, samples = sys.argv[1:]
text = TextSpec("builtin:books", samples=int(samples), max_length=64)
report = collect(CollectOptions((0, 1, 2, 3), Path(out), batch_size=16), ModelSpec(model), text)
assert report.tokens == 64 * int(samples), report
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_samples(tmp_path):
    """Not by ru_maxrss, which begins at the peak of the process that started this one.
    900 samples more are 900 * 64 * 4 * 256 * 4 bytes = 225 MiB of states: a run that kept them would show it."""
    folder = save_tiny(tmp_path / "wide", hidden_size=256, intermediate_size=64)
    peaks = []
    for samples in (100, 1000):
        result = run_python("-c", PEAK, folder, tmp_path / str(samples), samples)
        assert result.code == 0, result.err
        peaks.append(float(result.out))
    assert peaks[1] == pytest.approx(peaks[0], rel=0.10)
