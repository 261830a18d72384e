"""What the linear kernels for the rows of a batch (cuda/batch_hopper.cu on Hopper, cuda/batch.cu elsewhere) are made of: tiles, ring,
blocks. `skinny.py` launches them.

shape = shape_of(rows=32, shared=227 * 1024)
shape.constants(element=2, gated=True, act=1, races=False), shape.grid(tiles, width, processors=132)
shape = next(hopper_shapes(rows=32, groups=224, processors=132, shared=227 * 1024))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

COUNTERS = 16384
"""Where its counters begin among those of the stream: a launch may run beside a router's, which uses the first."""


@dataclass(frozen=True)
class Shape:
    groups: int
    """Of 8 rows of x."""
    matrix_tiles: int
    """16 rows of W each, a warp's."""
    across: int
    """Warps side by side in rows of W."""
    deep: int
    """Warps side by side in k."""
    stages: int
    pieces: int
    """128 bytes of a row each, in a step."""
    blocks: int
    """Of a multiprocessor."""

    @property
    def tile(self) -> int:
        return 16 * self.matrix_tiles * self.across

    @property
    def threads(self) -> int:
        return 32 * self.across * self.deep

    @property
    def slot(self) -> int:
        """Bytes of a step in the ring."""
        return (self.tile + 8 * self.groups) * 128 * self.pieces

    @property
    def shared(self) -> int:
        return self.stages * self.slot

    def constants(self, element: int, gated: bool, act: int, races: bool, other: int = 0) -> dict[str, int]:
        return {
            "T": element, "NT": self.groups, "GATED": int(gated), "ACT": act, "MI": self.matrix_tiles, "WR": self.across,
            "WK": self.deep, "STAGES": self.stages, "KC": self.pieces, "RACES": int(races),
            "OTHER": other,
        }  # fmt: skip

    def tiles(self, matrices: list[int], gated: bool) -> int:
        """Of matrices of so many rows; of two gated ones a tile takes half its rows each."""
        return -(-matrices[0] // (self.tile // 2)) if gated else sum(-(-n // self.tile) for n in matrices)

    def grid(self, tiles: int, width: int, processors: int) -> int:
        return min(processors * self.blocks, tiles * -(-width // (64 * self.pieces)))

    def parts(self, grid: int) -> int:
        """Floats in which blocks leave their shares of tiles, two a block."""
        return 2 * grid * self.tile * 8 * self.groups


SHAPES = (Shape(2, 1, 4, 2, 4, 2, 2), Shape(4, 1, 8, 2, 4, 2, 1), Shape(8, 2, 4, 2, 3, 2, 1))
"""For up to 16, 32 and 64 rows, chosen by the time of whole steps on an H200."""


def shape_of(rows: int, shared: int) -> Shape:
    """With as many steps in the ring as a block has shared memory for."""
    shape = next(shape for shape in SHAPES if rows <= 8 * shape.groups)
    return replace(shape, stages=min(shape.stages, (shared - 1024) // shape.slot))


CLUSTERS, ALONE = ((8, 2), (4, 2), (4, 3), (2, 2), (2, 3)), (2, 3, 4)
"""Blocks of a cluster and warpgroups of each; warpgroups of a block without one. Times of single launches on an H200 chose."""
MOST_STAGES = 10
DECLARED = 1024 + 128
"""Bytes of shared memory that are not the ring's."""
BESIDE = 19 * 1024
"""Bytes left to what runs beside: an MLP reads its weights while a router still decides."""


@dataclass(frozen=True)
class HopperShape:
    rows: int
    """Of x that the products have room for."""
    warpgroups: int
    """64 rows of W each, of a tile."""
    cluster: int
    """Blocks that have a tile together."""
    pieces: int
    """128 bytes of a row each, in a step."""
    stages: int

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups

    @property
    def slot(self) -> int:
        """Bytes of a step in the ring."""
        return (64 * self.warpgroups + self.rows) * 128 * self.pieces

    @property
    def shared(self) -> int:
        return self.stages * self.slot + 1024  # the ring begins at a multiple

    def constants(self, element: int, gated: bool, act: int, races: bool, other: int = 0) -> dict[str, int]:
        return {
            "T": element, "ROWS": self.rows, "GATED": int(gated), "ACT": act, "WG": self.warpgroups, "CLUSTER": self.cluster,
            "STAGES": self.stages, "KC": self.pieces, "RACES": int(races), "OTHER": other,
        }  # fmt: skip

    @property
    def groups(self) -> int:
        """Of rows of W, that a tile takes."""
        return 4 * self.warpgroups


def groups_of(matrices: list[int], gated: bool) -> int:
    """Groups of 16 rows of W; of two gated matrices of eight each."""
    return -(-matrices[0] // 8) if gated else sum(-(-n // 16) for n in matrices)


def hopper_shapes(rows: int, groups: int, processors: int, shared: int) -> Iterator[HopperShape]:
    """From the largest cluster on, those whose tiles can take all rows of W at once; at last blocks that go from tile to tile. How many
    clusters there can be at a time is for the device to say."""
    for cluster, warpgroups in CLUSTERS:
        if groups <= processors // cluster * 4 * warpgroups:
            yield hopper_shape(rows, cluster, warpgroups, shared)
    each = -(-groups // processors)
    yield hopper_shape(rows, 1, next((n for n in ALONE if each <= 4 * n), 3), shared)


def hopper_shape(rows: int, cluster: int, warpgroups: int, shared: int) -> HopperShape:
    made = HopperShape(next(n for n in (16, 32, 64) if rows <= n), warpgroups, cluster, 2 if warpgroups == 2 else 1, 0)
    return replace(made, stages=min(MOST_STAGES, (shared - DECLARED - BESIDE) // made.slot))
