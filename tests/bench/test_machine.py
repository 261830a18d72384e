"""What NVML says of a GPU, by a stand-in: that the real one answers is seen where a GPU is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sedac_cli.bench import machine


class FakeError(Exception):
    pass


@pytest.mark.parametrize(("reasons", "expected"), [(0, False), (0b100, True), (0b101, True), (0b1011, False)])
def test_the_power_limit_is_one_of_nvml_s_reasons(monkeypatch, reasons, expected):
    nvml = SimpleNamespace(
        NVMLError=FakeError, nvmlClocksEventReasonSwPowerCap=0b100,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: reasons,
    )  # fmt: skip
    monkeypatch.setattr(machine, "nvml_of", lambda index: (nvml, f"handle {index}"))
    assert machine.of_nvml(torch.device("cuda:1"), machine.at_power_limit) is expected
    assert machine.of_nvml(torch.device("cpu"), machine.at_power_limit) is None


def test_nvml_that_does_not_answer_knows_nothing(monkeypatch):
    def refuses(handle):
        raise FakeError

    nvml = SimpleNamespace(
        NVMLError=FakeError, nvmlClocksEventReasonSwPowerCap=4, nvmlDeviceGetCurrentClocksEventReasons=refuses
    )
    monkeypatch.setattr(machine, "nvml_of", lambda index: (nvml, "handle"))
    assert machine.of_nvml(torch.device("cuda:0"), machine.at_power_limit) is None
    monkeypatch.setattr(machine, "nvml_of", lambda index: None)
    assert machine.of_nvml(torch.device("cuda:0"), machine.at_power_limit) is None
