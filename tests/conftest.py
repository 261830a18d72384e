"""Fixtures: tiny random models and tokenizers made on the fly, the built-in model loaded once. No test touches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import json
import random
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A suite that a shell started in the background is deaf to Ctrl-C, and would hand that on to every program it tests.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def tiny_config(family: str = "qwen2", **changes):
    from transformers import AutoConfig

    values = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    return AutoConfig.for_model(family, **values)


def tiny_model(family: str = "qwen2", seed: int = 0, **changes):
    """A random float32 model, seeded, in eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).float().eval().requires_grad_(False)


def tiny_tokenizer():
    """One token per byte, a few merges, <pad> = 0 and <|endoftext|> = 1; any text goes in and comes out again."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d"), ("i", "n"), ("e", "r"), ("Ġ", "the")]
    words = ["<pad>", "<|endoftext|>", *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("<|endoftext|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|endoftext|>")


VOCABULARY = 2 + 256 + 7


def save_tiny(folder: Path, family: str = "qwen2", seed: int = 0, change=None, **config) -> Path:
    """A loadable model folder. Weights are larger than at birth, so that states and entropies differ between tokens."""
    config = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1} | config
    model = tiny_model(family, seed, **config)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.mul_(10.0)
        elif "norm" not in name:
            parameter.normal_(0, 0.1)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> str:
    """Text of random words; two seeds share no run of words worth the name."""
    rng = random.Random(seed)
    parts = ["the", "and", "sea", "was", "in", "her", "an", "old", "wind", "king", "ran", "to", "a", "grey", "hill"]
    return " ".join(rng.choice(parts) for _ in range(count))


@pytest.fixture(autouse=True)
def freed_memory_is_overwritten(request, monkeypatch):
    """Before a CUDA graph first runs: whoever keeps an address and not the tensor would read NaN, or -1."""
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        return
    seen, replay = weakref.WeakSet(), torch.cuda.CUDAGraph.replay

    def run(graph):
        if graph not in seen:
            overwrite_freed()
            seen.add(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", run)


def overwrite_freed() -> None:
    """All that torch holds back of the current device's memory. (What it gives away whole faults when it is read.)"""
    torch.cuda.empty_cache()
    held = []
    for size, some in ((512, 256), (2**20 + 512, 2)):  # the smallest block of either of torch's pools
        before = torch.cuda.memory_reserved()
        while torch.cuda.memory_reserved() == before:
            held += [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for _ in range(some)]


@pytest.fixture(scope="session")
def builtin():
    """The built-in model, float32 on CPU."""
    from sedac_cli.models import load_model

    return load_model("builtin:tiny")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A saved random qwen2 of 4 layers, hidden 32, with its tokenizer. Not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The same, loaded."""
    from sedac_cli.models import load_model

    return load_model(str(tiny_folder))


CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="session")
def chatty_folder(tmp_path_factory) -> Path:
    """The same shape with a chat template and room for long answers. Not to be changed."""
    folder = save_tiny(tmp_path_factory.mktemp("models") / "chatty", max_position_embeddings=4096)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chatty(chatty_folder):
    """The same, loaded."""
    from sedac_cli.models import load_model

    return load_model(str(chatty_folder))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 9000 tokens in 40 documents. Not to be changed."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n<|endoftext|>\n".join(words(60, seed) for seed in range(40)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def other_text(tmp_path_factory) -> Path:
    """Text that `text_file` does not hold."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("\n<|endoftext|>\n".join(words(60, 1000 + seed) for seed in range(20)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def collected(tmp_path_factory, tiny_folder, text_file) -> Path:
    """24 samples of 64 tokens at layers 1, 2, 3, trained probes, thresholds. Not to be changed: copy it."""
    from sedac_cli.config import ModelSpec, TextSpec
    from sedac_cli.pipeline.calibrate import CalibrateOptions, calibrate
    from sedac_cli.pipeline.collect import CollectOptions, collect
    from sedac_cli.pipeline.train_probes import TrainOptions, train_probes

    folder = tmp_path_factory.mktemp("data") / "sedac_data"
    text = TextSpec(str(text_file), samples=24, max_length=64)
    collect(CollectOptions(layers=(1, 2, 3), save_dir=folder), ModelSpec(str(tiny_folder)), text)
    train_probes(folder, TrainOptions(epochs=3, batch_size=256, rank=8))
    calibrate(folder, CalibrateOptions(rates=(0.2, 0.3, 0.4)))
    return folder


@pytest.fixture
def copied(collected, tmp_path) -> Path:
    """A collection of one's own, to be damaged."""
    import shutil

    return Path(shutil.copytree(collected, tmp_path / "sedac_data"))


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def sedac(capsys, monkeypatch):
    """Run the command line in this process: `sedac("collect", "--layers", 1)`."""
    from sedac_cli.__main__ import run

    def call(*args: object, env: dict[str, str] | None = None) -> Result:
        with monkeypatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            capsys.readouterr()
            code = run([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return call


def python(*args: object, env: dict[str, str] | None = None, **more) -> subprocess.Popen[str]:
    """A Python of its own that finds this checkout; stdout and stderr are piped."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    return subprocess.Popen([sys.executable, *map(str, args)], env=environment, **pipes)


def run_python(*args: object, env: dict[str, str] | None = None, **more) -> Result:
    process = python(*args, env=env, **more)
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def write_collection(folder: Path, states, labels, lengths: list[int], num_layers: int = 4) -> Path:
    """A collection made by hand: states and labels of one's choice, in the files that `collect` would have written."""
    from sedac_cli.artifacts.manifest import Manifest, ModelIdentity, make_step
    from sedac_cli.artifacts.tensors import save_tensors

    folder.mkdir(parents=True, exist_ok=True)
    rows = sum(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    tensors = {"token_ids.pt": torch.arange(rows).int(), "sequence_ids.pt": sequence}
    for layer in states:
        tensors[f"hidden_states_layer{layer}.pt"] = states[layer]
        tensors[f"entropies_layer{layer}.pt"] = labels[layer]
    files = {name: save_tensors(folder / name, value) for name, value in tensors.items()}
    width = next(iter(states.values())).shape[1]
    model = ModelIdentity(
        ref="synthetic", architecture={"num_hidden_layers": num_layers, "hidden_size": width}, config_digest="c",
        tokenizer_digest="t", dtype="float32", weights_sample=[1.0],
    )  # fmt: skip
    step = make_step({"layers": sorted(states), "target": "final"}, files, {"label_unit": "bits"})
    Manifest(model=model, steps={"collect": step}).write(folder)
    return folder


@pytest.fixture
def synthetic(tmp_path) -> Path:
    """16 sequences of uneven length, layers 1 and 3 of 4, width 12, labels that depend on the states."""
    generator = torch.Generator().manual_seed(0)
    lengths = [40 + 7 * (n % 5) for n in range(16)]
    states = {layer: torch.randn(sum(lengths), 12, generator=generator) for layer in (1, 3)}
    labels = {layer: x[:, 0].abs() + 0.1 for layer, x in states.items()}
    return write_collection(tmp_path / "synthetic", states, labels, lengths)


@pytest.fixture(scope="session")
def toy_tasks(tmp_path_factory) -> Path:
    """A folder with three tasks of the lm-evaluation-harness: toy_choice, toy_generate, toy_rolling; 12 documents each."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    nouns = ["sea", "wind", "king", "hill", "old man", "grey house", "road", "night", "ship", "tree"]
    documents = []
    for _ in range(12):
        question = " ".join(["the", *rng.choices(nouns, k=rng.randint(1, 5)), "was in the"])
        documents.append({"question": question, "choices": rng.sample(nouns, 3), "answer": rng.randrange(3)})
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test", "metadata": {"version": 1.0}, "doc_to_text": "{{question}}",
    }  # fmt: skip
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "toy_choice": {
            "output_type": "multiple_choice", "doc_to_target": "{{answer}}", "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        "toy_generate": {
            "output_type": "generate_until", "doc_to_target": " a",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "toy_rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }  # fmt: skip
    for name, own in tasks.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **own}), encoding="utf-8")
    return folder


def pytest_collection_modifyitems(items):
    from importlib.metadata import packages_distributions

    if "vllm" not in packages_distributions():
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make vllm-env vllm-test"))


@pytest.fixture(
    scope="session", params=os.environ.get("SEDAC_TEST_FAMILIES", "qwen2,llama,qwen3,mistral,gemma,phi3").split(",")
)
def family(request, tmp_path_factory):
    """(vLLM on the CPU in this process, the same tiny model under Hugging Face), for one family after the other."""
    from vllm_helpers import SIZE, Engine

    from sedac_cli.models import load_model

    folder = save_tiny(tmp_path_factory.mktemp("vllm") / request.param, request.param, **SIZE)
    engine = Engine(folder)
    yield engine, load_model(str(folder))
    engine.close()


@pytest.fixture(autouse=True)
def _no_garbage_while_capturing(request):
    """A CUDA graph that the collector frees while another is being captured ends the process."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    import gc

    gc.collect()
    gc.disable()
    yield
    gc.enable()
