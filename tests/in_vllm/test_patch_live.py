"""The proof of `sedac patch` with a real vLLM: it succeeds where the plugin is on, and fails where it silently is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sedac_cli.artifacts.files import write_json
from sedac_cli.errors import InputError

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def test_a_settings_file_alone_turns_it_on(tmp_path, monkeypatch):
    """In the user's place: the environment that runs these tests is not written to."""
    from sedac_cli.vllm.patch_proof import prove
    from sedac_cli.vllm.patch_site import find_site
    from sedac_cli.vllm.switch import Switch, environment_place, user_place

    if environment_place(Path(sys.prefix)).exists():
        pytest.skip(f"{environment_place(Path(sys.prefix))} is in force")
    site = find_site(sys.executable)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # other tests keep the engine in their own process
    path = user_place(Path(sys.prefix))
    path.parent.mkdir()
    settings = {"gate": "always:20", "sinks": 4, "protect_last": 9}
    write_json(path, Switch(path, "0.1.0", site.vllm, settings, False).document())
    proof = prove(sys.executable, {})
    assert proof.workers == 1
    assert proof.processes >= 2  # the one that configured the engine, and the engine's own
    assert proof.skipped == [0, proof.tokens, 0, proof.tokens]
    assert proof.change > 0.01


def test_a_plugin_that_is_not_loaded_fails_the_proof():
    from sedac_cli.vllm.patch_proof import prove

    with pytest.raises(InputError, match=r"without a gate \(0 of its processes"):
        prove(sys.executable, {"SEDAC_ENABLED": "1", "VLLM_PLUGINS": ""})
