"""The SEDAC_ variables and what requests may ask for: parsed in one place, refused with the name and the value."""

from __future__ import annotations

import numpy as np
import pytest

from sedac_cli.errors import InputError, UsageError
from sedac_cli.vllm.requests import DEFAULT, DENSE, Wish, read_wish, wish_or_dense
from sedac_cli.vllm.settings import KEY, read_settings, settings_of


def test_nothing_asked_is_nothing():
    assert read_settings(None, {}) is None
    assert read_settings(None, {"SEDAC_ENABLED": "0", "SEDAC_GATE": "always:2"}) is None
    assert read_settings({"enabled": False}, {"SEDAC_ENABLED": "1"}) is None


def test_the_defaults_are_those_of_the_earlier_versions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = read_settings(None, {"SEDAC_ENABLED": "1"})
    assert found.probe_layers == [7, 14, 21]
    assert found.probe_dir == str(tmp_path / "sedac_data")
    assert (found.probe_rank, found.adaptive, found.calibration_steps, found.log_every) == (64, True, 50, 50)
    assert found.exit_rates == [0.2, 0.6, 0.9]
    assert found.thresholds is None
    assert found.given == []


def test_variables_are_read_and_additional_config_goes_first():
    environment = {
        "SEDAC_ENABLED": "1", "SEDAC_PROBE_LAYERS": "1, 2", "SEDAC_EXIT_RATES": "0.1,0.2", "SEDAC_ADAPTIVE": "0",
        "SEDAC_THRESHOLDS": "0.5,0.25", "SEDAC_LOG_EVERY": "7",
    }  # fmt: skip
    found = read_settings({"log_every": 9}, environment)
    assert found.probe_layers == [1, 2]
    assert found.thresholds == [0.5, 0.25]
    assert not found.adaptive
    assert found.log_every == 9


@pytest.mark.parametrize(
    ("asked", "environment", "words"),
    [
        ({"gat": "never"}, {}, ["gat", "gate"]),
        ("always:2", {}, ["str"]),
        ({"version": "0"}, {}, ["version"]),
        (None, {"SEDAC_ENABLED": "maybe"}, ["SEDAC_ENABLED", "maybe"]),
        (None, {"SEDAC_ENABLED": "1", "SEDAC_PROBE_LAYERS": "7,5"}, ["SEDAC_PROBE_LAYERS", "rise"]),
        (None, {"SEDAC_ENABLED": "1", "SEDAC_PROBE_RANK": "many"}, ["SEDAC_PROBE_RANK", "many"]),
        (None, {"SEDAC_ENABLED": "1", "SEDAC_EXIT_RATES": "0.2"}, ["exit_rates", "3"]),
        (None, {"SEDAC_ENABLED": "1", "SEDAC_EXIT_RATES": "0.2,0.3,1.5"}, ["SEDAC_EXIT_RATES"]),
        (None, {"SEDAC_ENABLED": "1", "SEDAC_PHASE": "morning"}, ["SEDAC_PHASE"]),
    ],
)
def test_nonsense_is_named(asked, environment, words):
    with pytest.raises(UsageError) as error:
        read_settings(asked, environment)
    for word in words:
        assert word in error.value.message + str(error.value.hint)


def test_settings_travel_and_name_themselves():
    one, two = (read_settings({"gate": f"always:{layer}"}, {}) for layer in (2, 3))
    assert settings_of({KEY: one.model_dump()}) == one
    assert settings_of({}) is None
    assert one.digest == settings_of({KEY: one.model_dump()}).digest != two.digest
    with pytest.raises(InputError, match="not loaded"):
        settings_of({KEY: {"gate": "always:2"}})
    with pytest.raises(InputError, match=r"0\.0\.0"):
        settings_of({KEY: one.model_dump() | {"version": "0.0.0"}})


@pytest.mark.parametrize(
    ("extra", "wish"),
    [
        (None, DEFAULT),
        ({}, DEFAULT),
        ({"other": 3}, DEFAULT),
        ({"sedac": 1}, DEFAULT),
        ({"sedac": 0}, DENSE),
        ({"sedac": False}, DENSE),
        ({"sedac": "off", "sedac_threshold": 0.2}, DENSE),
        ({"sedac_threshold": "0.25"}, Wish(threshold=0.25)),
    ],
)
def test_wishes(extra, wish):
    assert read_wish(extra) == wish


@pytest.mark.parametrize(
    "extra",
    [
        {"sedac": 2}, {"sedac": [0]}, {"sedac": {"x": 1}}, {"sedac": "please"}, {"sedac_threshold": "low"},
        {"sedac_threshold": float("nan")}, {"sedac_threshold": True}, {"sedac_thresh": 1},
    ],
)  # fmt: skip
def test_nonsense_in_a_request_is_refused_or_runs_dense(extra):
    with pytest.raises(UsageError):
        read_wish(extra)
    assert wish_or_dense(extra) == DENSE


def test_rows_of_a_step_know_their_phase_and_wishes():
    from sedac_cli.vllm.runner import step_rows

    lengths, computed, prompts = (np.array(x) for x in ([3, 1, 2], [4, 0, 5], [10, 1, 5]))
    rows = step_rows(lengths, computed, prompts, [DEFAULT, DENSE, Wish(threshold=0.5)])
    assert rows.position.tolist() == [4, 5, 6, 0, 5, 6]
    assert rows.prefill.tolist() == [True, True, True, True, False, False]
    assert rows.dense.tolist() == [False, False, False, True, False, False]
    assert np.isnan(rows.strict[:4]).all()
    assert rows.strict[4:].tolist() == [0.5, 0.5]
    plain = step_rows(lengths, computed, prompts, [DEFAULT] * 3)
    assert plain.dense is None
    assert plain.strict is None
