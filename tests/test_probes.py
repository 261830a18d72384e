"""LREProbe computes its formula, and a file that is not a fitting probe is refused with both values."""

from __future__ import annotations

import math

import pytest
import torch

from sedac_cli.artifacts.tensors import save_tensors
from sedac_cli.errors import InputError
from sedac_cli.probes import KEYS, LREProbe, load_probe


def state(hidden=6, rank=4, seed=0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    probe = LREProbe(hidden, rank)
    for parameter in probe.parameters():
        torch.nn.init.normal_(parameter)
    return dict(probe.state_dict())


def saved(tmp_path, value):
    save_tensors(tmp_path / "probe.pth", value)
    return tmp_path / "probe.pth"


def by_hand(s: dict[str, torch.Tensor], x: list[float]) -> float:
    """Linear, LayerNorm, linear, softplus, in plain Python."""
    w, b = s["proj.weight"].tolist(), s["proj.bias"].tolist()
    z = [sum(wi * xi for wi, xi in zip(row, x, strict=True)) + bi for row, bi in zip(w, b, strict=True)]
    mean = sum(z) / len(z)
    variance = sum((v - mean) ** 2 for v in z) / len(z)
    n = [(v - mean) / math.sqrt(variance + 1e-5) for v in z]
    n = [v * g + c for v, g, c in zip(n, s["norm.weight"].tolist(), s["norm.bias"].tolist(), strict=True)]
    y = sum(h * v for h, v in zip(s["head.weight"][0].tolist(), n, strict=True)) + s["head.bias"].item()
    return math.log1p(math.exp(-abs(y))) + max(y, 0.0)


def test_the_formula(tmp_path):
    s = state()
    probe = load_probe(saved(tmp_path, s), hidden_size=6)
    x = torch.randn(2, 5, 6)
    risk = probe(x)
    assert risk.shape == (2, 5)
    assert risk.dtype == torch.float32
    expected = [[by_hand(s, row) for row in batch] for batch in x.tolist()]
    torch.testing.assert_close(risk, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert (probe.hidden_size, probe.rank) == (6, 4)
    assert not any(p.requires_grad for p in probe.parameters())


def test_half_precision_states_are_read_in_float32(tmp_path):
    probe = load_probe(saved(tmp_path, state()))
    x = torch.randn(5, 6).bfloat16()
    assert torch.equal(probe(x), probe(x.float()))


def test_older_files_have_no_bias(tmp_path):
    s = state()
    s["proj.bias"].zero_()
    new = load_probe(saved(tmp_path, s))
    del s["proj.bias"]
    old = load_probe(saved(tmp_path, s))
    x = torch.randn(3, 6)
    assert torch.equal(old(x), new(x))


def test_a_half_precision_file_loads(tmp_path):
    half = {key: value.half() for key, value in state().items()}
    assert load_probe(saved(tmp_path, half)).proj.weight.dtype == torch.float32


def test_a_wrong_width_names_both(tmp_path):
    with pytest.raises(InputError, match=r"probe\.pth reads hidden states of width 6; the model's are 8 wide"):
        load_probe(saved(tmp_path, state()), hidden_size=8)


@pytest.mark.parametrize("key", [k for k in KEYS if k != "proj.bias"])
def test_missing_keys(tmp_path, key):
    s = state()
    del s[key]
    with pytest.raises(InputError, match=f"expected .*{key}.*, found") as caught:
        load_probe(saved(tmp_path, s))
    assert key not in caught.value.message.split("found")[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["norm.bias"].fill_(float("nan")), "NaN or infinite"),
        (lambda s: s["proj.weight"].__setitem__((0, 0), float("inf")), "NaN or infinite"),
        (lambda s: s.update(extra=torch.zeros(1)), "does not fit a probe.*extra"),
        (lambda s: s.update({"head.weight": torch.zeros(1, 9)}), "does not fit a probe.*head.weight"),
        (lambda s: s.update({"proj.weight": torch.zeros(24)}), "must be a matrix"),
        (lambda s: s.update({"head.bias": 1.0}), "all values tensors"),
    ],
)
def test_what_is_no_probe_is_refused(tmp_path, change, said):
    s = state()
    change(s)
    with pytest.raises(InputError, match=said):
        load_probe(saved(tmp_path, s))


def test_a_tensor_is_no_probe(tmp_path):
    with pytest.raises(InputError, match="found Tensor"):
        load_probe(saved(tmp_path, torch.zeros(3)))
