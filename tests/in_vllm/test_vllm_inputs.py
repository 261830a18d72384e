"""The records of a step: rows that only an earlier, longer step had become padding."""

from __future__ import annotations

import numpy as np
import torch

from sedac_cli.vllm.inputs import MAY_SKIP, MUST_RUN, PADDING, StepInputs


def write(inputs, count, state=MAY_SKIP, protected=False):
    strict = np.full(count, 0.5, dtype=np.float32)
    inputs.write(np.arange(count, dtype=np.int32) + 3, np.full(count, state, dtype=np.int32), strict, protected)


def test_a_shorter_step_leaves_padding_behind():
    inputs = StepInputs(8, torch.device("cpu"))
    write(inputs, 6, MUST_RUN, protected=True)
    assert int(inputs.protected) == 1
    assert int(inputs.count) == 6
    assert inputs.position(6).tolist() == [3, 4, 5, 6, 7, 8]
    assert inputs.strict(6).tolist() == [0.5] * 6
    for _ in range(9):  # once around the ring and further
        write(inputs, 2)
        assert inputs.state(8).tolist() == [MAY_SKIP] * 2 + [PADDING] * 6
    assert int(inputs.protected) == 0
    assert int(inputs.count) == 2
