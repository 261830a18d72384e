"""What launches for a batch are made of, by arithmetic alone: no GPU."""

from __future__ import annotations

import pytest

from sedac_cli.gpu.batch import BESIDE, DECLARED, groups_of, hopper_shapes

SHARED = 227 * 1024


@pytest.mark.parametrize("rows", [9, 16, 17, 40, 64])
@pytest.mark.parametrize("groups", [1, 8, 100, 224, 288, 384, 512, 1600, 2368, 9504])
@pytest.mark.parametrize("processors", [16, 78, 132])
def test_what_is_tried(rows, groups, processors):
    made = list(hopper_shapes(rows, groups, processors, SHARED))
    assert [shape.cluster for shape in made[:-1]] == sorted((shape.cluster for shape in made[:-1]), reverse=True)
    assert made[-1].cluster == 1
    for shape in made:
        assert rows <= shape.rows < 2 * max(rows, 9)
        assert shape.groups % shape.cluster == 0, "a block brings whole groups to an end"
        assert shape.shared + DECLARED - 1024 <= SHARED - BESIDE
        assert shape.stages >= 3
        assert 4 * shape.rows * 16 * shape.groups <= shape.stages * shape.slot, "the sums take the ring's place"
        if shape.cluster > 1:
            assert groups <= processors // shape.cluster * shape.groups


def test_matrices_of_a_7b_model():
    """A tile is a cluster's where one turn is enough; the MLP's first launch and the head go from tile to tile."""
    first = {
        name: next(hopper_shapes(32, groups_of(sizes, gated), 132, SHARED))
        for name, sizes, gated in (
            ("qkv", [3584, 512, 512], False), ("out", [3584], False), ("gate, up", [18944, 18944], True),
            ("down", [3584], False), ("head", [152064], False),
        )
    }  # fmt: skip
    assert {name: (shape.cluster, shape.groups) for name, shape in first.items()} == {
        "qkv": (4, 12), "out": (4, 8), "gate, up": (1, 12), "down": (4, 8), "head": (1, 12),
    }  # fmt: skip


def test_groups():
    assert groups_of([17, 16, 1], gated=False) == 2 + 1 + 1
    assert groups_of([17, 17], gated=True) == 3
