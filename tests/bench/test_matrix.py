"""Matrices: the earlier versions' form is read, ready ones run, and what is not known is refused with the closest name."""

from __future__ import annotations

import json

import pytest

from sedac_cli.bench import plans
from sedac_cli.bench.matrix import make_matrix, read_matrix, ready_matrices
from sedac_cli.bench.modes import ALIASES, MODES, find_mode
from sedac_cli.bench.plans import plan_of
from sedac_cli.config import split_gates
from sedac_cli.errors import InputError, UsageError

EARLIER = {
    "base_model": "Qwen/Qwen2.5-3B-Instruct",
    "experiments": [
        {"name": "vanilla", "mode": "vanilla"},
        {"name": "sedac_v5", "mode": "sedac", "sedac_layer": 2, "sedac_threshold": 0.45, "sedac_probe_dir": "D"},
        {"name": "ngram", "mode": "ngram", "speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"name": "ngram_sedac_adaptive", "mode": "ngram_sedac_adaptive", "sedac_probe_layers": [1, 2, 3],
         "sedac_adaptive": True, "sedac_exit_rates": [0.2, 0.6, 0.9], "sedac_calibration_steps": 10, "sedac_probe_dir": "D"},
    ],
    "thresholds": {"min_ar": 0.3, "min_trr": 0.2, "max_ppl_ratio": 1.05},
}  # fmt: skip


def test_the_form_of_the_earlier_versions():
    matrix = make_matrix(EARLIER, "m.json")
    assert [x.how.name for x in matrix.experiments] == ["dense", "gated", "ngram", "ngram_sedac_adaptive"]
    assert matrix.limits(matrix.experiments[1]).max_ppl_ratio == 1.05
    assert matrix.experiments[2].drafts.num_speculative_tokens == 3


def test_values_as_the_earlier_versions_wrote_them():
    """Lists as their environment variables have them, an empty speculative_config, and defaults for `sedac` modes."""
    written = {"name": "a", "mode": "sedac", "sedac_probe_layers": "7, 14,21", "sedac_thresholds": "0.8,1.0,1.2",
               "speculative_config": {}, "sedac_log_every": 50}  # fmt: skip
    (found,) = make_matrix({"experiments": [written]}, "m").experiments
    assert (found.sedac_probe_layers, found.sedac_thresholds) == ([7, 14, 21], [0.8, 1.0, 1.2])
    assert found.speculative_config is None
    (bare,) = make_matrix({"experiments": [{"name": "a", "mode": "sedac"}]}, "m").experiments
    assert plans._layers(bare) == [7, 14, 21]
    assert plans._thresholds(bare, [7, 14, 21]) == [0.8, 1.3, 1.7]
    with pytest.raises(UsageError, match="names no gate"):
        plans._layers(make_matrix({"experiments": [{"name": "a"}]}, "m").experiments[0])
    with pytest.raises(UsageError, match="sedac_exit_rates"):
        make_matrix({"experiments": [{"name": "a", "sedac_exit_rates": "0.2,many"}]}, "m")


@pytest.mark.parametrize("name", ["speed", "quality", "gates", "speculation"])
def test_ready_matrices(name, builtin):
    matrix = read_matrix(f"builtin:{name}")
    assert matrix.base_model == "builtin:tiny"
    assert matrix.experiments[0].is_baseline
    assert name in ready_matrices()
    for experiment in matrix.experiments:
        assert plan_of(experiment, builtin.decoder, builtin.identity, 0).gate.num_layers == 28


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"experimnts": []}, "unknown key 'experimnts'. Did you mean 'experiments'?"),
        ({"experiments": []}, "experiments: List should have at least 1 item"),
        ({"experiments": [{"name": "a", "mode": "ngramm"}]}, "there is no mode 'ngramm'. Did you mean 'ngram'?"),
        ({"experiments": [{"name": "a", "gat": "x"}]}, "'experiments[0].gat'. Did you mean 'gate'?"),
        ({"experiments": [{"name": "a", "sedac_layr": 1}]}, "Did you mean 'sedac_layer'?"),
        (
            {"experiments": [{"name": "a", "mode": "ngram", "speculative_config": {"num_speculative": 1}}]},
            "Did you mean 'num_speculative_tokens'?",
        ),
        ({"thresholds": {"max_ppl": 1}}, "unknown key 'thresholds.max_ppl'. Did you mean 'max_ppl_ratio'?"),
        ({"experiments": [{"name": "a", "gate": "never", "sedac_layer": 2}]}, "each name a gate: give one"),
        ({"experiments": [{"name": "a", "speculative_config": {"num_speculative_tokens": 2}}]}, "makes no drafts"),
        (
            {"experiments": [{"name": "a", "mode": "ngram", "speculative_config": {"method": "eagle"}}]},
            "method 'eagle' is not what mode 'ngram' does (ngram)",
        ),
        ({"experiments": [{"name": "a"}, {"name": "a"}]}, "two experiments are called 'a'"),
        ({"batch": [0]}, "batch holds 0"),
        ({"backend": "tgi"}, "backend: Input should be 'hf', 'vllm' or 'openai'"),
        ({"new_tokens": "many"}, "new_tokens: Input should be a valid integer"),
    ],
)
def test_what_is_not_known_is_refused(change, said):
    with pytest.raises(UsageError) as caught:
        make_matrix(EARLIER | change, "m.json")
    assert said in caught.value.message


def test_files_that_are_no_matrix(tmp_path, sedac):
    path = tmp_path / "m.json"
    for text, code in (("{", 3), ("[1]", 2), ('{"experiments": [{"name": "a", "mode": "x"}]}', 2)):
        path.write_text(text)
        assert sedac("bench", "--matrix", path).code == code
    assert sedac("bench", "--matrix", tmp_path / "none.json").code == 3
    assert "Did you mean 'speed'?" in sedac("bench", "--matrix", "builtin:sped").err


def test_every_alias_is_a_mode():
    assert {find_mode(alias).name for alias in ALIASES} <= set(MODES)


def test_an_experiments_own_thresholds_go_first():
    experiments = [{"name": "a", "gate": "never", "thresholds": {"max_ppl_ratio": 2.0}}]
    matrix = make_matrix({"experiments": experiments, "thresholds": {"max_ppl_ratio": 1.1, "min_ar": 0.5}}, "m")
    limits = matrix.limits(matrix.experiments[0])
    assert (limits.max_ppl_ratio, limits.min_ar) == (2.0, 0.5)


def test_gates_divided_by_commas():
    assert split_gates("always:14,stability:tau=0.99,k=3,random:0.3") == [
        "always:14",
        "stability:tau=0.99,k=3",
        "random:0.3",
    ]


# The sedac_* keys ---------------------------------------------------------------------------------------------


def gate_of(tiny, folder, **keys):
    row = {"name": "a", "mode": "sedac", "sedac_probe_dir": str(folder), **keys}
    return plan_of(make_matrix({"experiments": [row]}, "m").experiments[0], tiny.decoder, tiny.identity, 0).gate


def test_fixed_cascade_and_adaptive_gates_from_keys(tiny, collected):
    fixed = gate_of(tiny, collected, sedac_layer=2, sedac_threshold=0.45)
    assert (fixed.name, fixed.parameters()["thresholds"]) == ("fixed", [pytest.approx(0.45)])
    cascade = gate_of(tiny, collected, sedac_probe_layers=[1, 3], sedac_thresholds=[0.5, 1.5], sedac_probe_rank=8)
    assert (cascade.name, cascade.parameters()["checkpoints"]) == ("cascade", [1, 3])
    adaptive = gate_of(tiny, collected, sedac_probe_layers=[1, 2, 3], sedac_adaptive=True)
    assert adaptive.adaptive.rates == {1: 0.2, 2: 0.6, 3: 0.9}


@pytest.mark.parametrize(
    ("keys", "said", "kind"),
    [
        ({}, "no such file", InputError),  # the layers of the earlier versions
        (
            {"sedac_layer": 2, "sedac_threshold": 1.0, "sedac_probe_rank": 64},
            "has rank 8, sedac_probe_rank says 64",
            UsageError,
        ),
        ({"sedac_probe_layers": [1, 2], "sedac_thresholds": [1.0]}, "1 sedac_thresholds for layers [1, 2]", UsageError),
        ({"sedac_layer": 0, "sedac_threshold": 1.0}, "sedac_probe_layer0.pth", InputError),
    ],
)
def test_keys_that_do_not_fit(tiny, collected, keys, said, kind):
    with pytest.raises(kind) as caught:
        gate_of(tiny, collected, **keys)
    assert said in caught.value.message


def test_switched_off_is_dense():
    row = {"name": "a", "mode": "sedac", "sedac_enabled": False, "gate": "always:2"}
    assert make_matrix({"experiments": [row]}, "m").experiments[0].is_baseline


def test_ready_matrices_are_plain_json():
    for path in ready_matrices().values():
        assert json.loads(path.read_text())["description"]
