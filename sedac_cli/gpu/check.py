"""Compile every kernel, in every form that is ever launched, for every architecture, with nvcc: no GPU needed.

python -m sedac_cli.gpu.check [--arch sm_90] [--only entropy] [--brief]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

from sedac_cli.gpu.batch import ALONE, CLUSTERS, SHAPES, HopperShape, hopper_shape
from sedac_cli.gpu.compile import OPTIONS, refuse_shared, source_text
from sedac_cli.gpu.decode import Heads, attend_bytes, attend_constants, norm_route_constants
from sedac_cli.gpu.entropy import FEW, MANY
from sedac_cli.gpu.probe import EIGHT, FOUR, ROUTER_SLICE, TWO, shared_bytes
from sedac_cli.gpu.skinny import Cut, skinny_bytes, skinny_constants

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")


LIMITS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_90a": 227, "sm_100": 227}
"""KiB of shared memory a block may ask for."""
FEWEST = {"attend": 1, "batch": 2}
"""Stages that a wrapper goes down to where shared memory is small; 3 for the others."""

Job = tuple[str, str, dict[str, int]]
"""(architecture, family, constants)"""


def architectures(chosen: Sequence[str], constants: dict[str, int]) -> list[str]:
    """Where a form runs: warpgroup products are Hopper's alone; clusters, and launches that race their decision, came with it."""
    if "CLUSTER" in constants:
        return ["sm_90a"] if "sm_90" in chosen else []
    late = "CLUSTERED" in constants or constants.get("RACES")
    return [arch for arch in chosen if not late or arch in ("sm_90", "sm_100")]


def forms() -> Iterator[tuple[str, dict[str, int]]]:
    """Every (family, constants) the wrappers can ask for, up to sizes that only change a loop's length."""
    for t, form in product(range(3), (MANY, FEW)):
        yield "entropy", {"T": t, "DECISION": 0} | form.constants
        for ht in range(3):
            yield "entropy", {"T": t, "HT": ht, "DECISION": 1} | form.constants
    for t in range(3):
        for size, ranks in ((1, 1), (8, 8)):
            yield "probe", {"T": t, "RP": 64, "ROWS": size, "RANKS": ranks, "PARTS": 1, "STAGES": 1}
        for size in (1, 2, 4, 8):
            yield "router", {"T": t, "ROWS": size}
    for t, rp, size, parts, stages in product((1, 2), (64, 256), (32, 64), (1, 2), (3, 4)):
        yield "probe", {"T": t, "RP": rp, "ROWS": size, "RANKS": 0, "PARTS": parts, "STAGES": stages}
    for t, parts, shape in product((1, 2), (1, 2), (EIGHT, FOUR, TWO)):
        yield "probe", {"T": t, "RP": 64} | shape.constants(parts)
        yield "probe", {"T": t, "RP": 64} | shape.constants(parts) | {"SET_CONDITION": 1}
    for width, key, two in product((16, 8, 4, 2), (0, 1), (0, 1)):
        yield "route", {"WIDTH": width, "KEY": key, "TWO": two}
    yield "conditional", {"SET_CONDITION": 1}
    for t, gated in product((1, 2), (False, True)):
        for act in (1, 2, 3) if gated else (0, 1):
            for tiles, loop, x_source in product((1,) if gated else (1, 2), (False, True), (0, 1, 2)):
                cut = Cut(tiles, 1 + loop, 1)
                for races in (False, True) if gated and x_source < 2 else (False,):
                    yield "skinny", skinny_constants(t, gated, act, cut, x_source, races)
                    if gated or (act == 0 and x_source < 2):  # a stand-in's two maps
                        yield "skinny", skinny_constants(t, gated, act, cut, x_source, races, 1 + gated)
                    if x_source == 0 and act < 2:  # of narrow rows
                        yield "skinny", skinny_constants(t, gated, act, cut, x_source, races, ahead=1)
            for made, races in product(SHAPES, (False, True) if gated else (False,)):
                yield "batch", made.constants(t, gated, act, races)
                if gated or act == 0:
                    yield "batch", made.constants(t, gated, act, races, 1 + gated)
                if act < 2:  # what is left of the ring where shared memory is small
                    yield "batch", replace(made, stages=2).constants(t, gated, act, races)
            for rows, (cluster, warpgroups) in product((16, 32, 64), (*CLUSTERS, *((1, n) for n in ALONE))):
                hopper = hopper_shape(rows, cluster, warpgroups, LIMITS["sm_90a"] * 1024)
                for races in (False, True) if gated else (False,):
                    yield "batch_hopper", hopper.constants(t, gated, act, races)
                    if gated or act == 0:
                        yield "batch_hopper", hopper.constants(t, gated, act, races, 1 + gated)
    for t, act in product(range(3), (1, 2, 3)):
        yield "activate", {"T": t, "ACT": act}
    yield "step", {}
    for t in range(3):
        yield "step", {"T": t}
        yield "norm", {"T": t}
        yield "norm", {"T": t, "RESIDUAL": 1}
    for t, (size, group), rows in product((1, 2), ((64, 1), (128, 7), (256, 16), (80, 4)), (1, 50, 100)):
        for places, shared, clusters in ((4096, 227, True), (256, 163, False), (1024, 99, False)):
            yield (
                "attend",
                attend_constants(t, Heads(group, 1, size, size, 1.0), rows, places, 132, shared * 1024, clusters),
            )
    for t, units, rows, clusters, added in product(
        range(3), (7, 16, 64), (1, 16, 32, 64), (False, True), ({}, {"RESIDUAL": 1})
    ):
        routed = norm_route_constants(t, units, rows, 3584, clusters) | added
        yield "norm_route", routed
        yield "norm_route", routed | {"SET_CONDITION": 1}
    for t in range(3):
        size, ranks = (8, 8) if t == 0 else (64, 0)
        yield "probe", {"T": t, "RP": 64, "ROWS": 1, "RANKS": 1, "PARTS": 1, "STAGES": 1, "SET_CONDITION": 1}
        yield "probe", {"T": t, "RP": 64, "ROWS": size, "RANKS": ranks, "PARTS": 2, "STAGES": 4, "SET_CONDITION": 1}
        yield "router", {"T": t, "ROWS": 1, "SET_CONDITION": 1}
    for t, units in product(range(3), (8, 24, 72)):
        yield "router_few", {"T": t, "SLICE": ROUTER_SLICE, "UNITS": units}
        yield "router_few", {"T": t, "SLICE": ROUTER_SLICE, "UNITS": units, "SET_CONDITION": 1}


def brief(jobs: Iterable[Job]) -> list[Job]:
    """The first and the last form of each family on each architecture: every source, as every compiler sees it."""
    ends: dict[tuple[str, str], tuple[Job, Job]] = {}
    for job in jobs:
        arch, family, _ = job
        ends[arch, family] = ends.get((arch, family), (job, job))[0], job
    return [job for first, last in ends.values() for job in ([first] if first is last else [first, last])]


def dynamic_bytes(family: str, constants: dict[str, int]) -> int:
    """Shared memory the wrapper asks for at launch, beside what the kernel declares."""
    if family == "attend":
        return attend_bytes(constants)
    if family == "skinny":
        return skinny_bytes(constants)
    if family == "batch":
        batch = next(shape for shape in SHAPES if shape.groups == constants["NT"])
        return replace(batch, stages=constants["STAGES"]).shared
    if family == "batch_hopper":
        names = ("ROWS", "WG", "CLUSTER", "KC", "STAGES")
        return HopperShape(*(constants[name] for name in names)).shared
    if family == "entropy":
        return next(form for form in (FEW, MANY) if form.group == constants["GROUP"]).shared
    if family != "probe" or constants["RANKS"]:
        return 0
    return shared_bytes(constants["ROWS"], constants["PARTS"], constants["STAGES"], "CLUSTER" in constants)


def compile_one(nvcc: str, folder: Path, arch: str, family: str, constants: dict[str, int]) -> tuple[bool, str]:
    """(compiled, registers and spills per entry, or the error)."""
    place = Path(tempfile.mkdtemp(dir=folder))
    source = place / f"{family}.cu"
    source.write_text(source_text(family, constants))
    # cudaGraphSetConditional is only linked by the driver, so those kernels are compiled but not linked here.
    extra = ["-rdc=true"] if "SET_CONDITION" in constants else []
    command = [
        nvcc,
        *OPTIONS,
        *extra,
        "-cubin",
        f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}",
        "-Xptxas",
        "-v",
        "-o",
        str(place / "out"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return False, done.stderr.strip()
    registers = re.findall(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
    fixed = max(map(int, re.findall(r"(\d+) bytes smem", done.stderr)), default=0)
    dynamic = dynamic_bytes(family, constants)
    try:
        refuse_shared(family, fixed, dynamic, LIMITS[arch] * 1024)
    except RuntimeError as error:
        # What the wrapper goes down to on small chips must fit; more stages are tried on every chip, and not used there.
        if constants.get("STAGES", 0) <= FEWEST.get(family, 3):
            return False, str(error)
    return True, f"registers {'/'.join(registers)}, spilled bytes {'/'.join(spills)}, shared {fixed} + {dynamic}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", action="append", help="sm_90, ...; all by default", choices=ARCHITECTURES)
    parser.add_argument(
        "--only",
        help="one family: entropy, probe, router, router_few, route, conditional, skinny, batch, batch_hopper, norm, attend, norm_route, activate, step",
    )
    parser.add_argument("--brief", action="store_true", help="the first and the last form of each family alone")
    chosen = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("skipped: no nvcc on PATH, so the kernels were not compiled")
        return 0
    jobs: list[Job] = [
        (arch, family, constants)
        for family, constants in forms()
        if chosen.only in (None, family)
        for arch in architectures(chosen.arch or ARCHITECTURES, constants)
    ]
    if chosen.brief:
        jobs = brief(jobs)
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda job: compile_one(nvcc, Path(folder), *job), jobs)
        for (arch, family, constants), (good, text) in zip(jobs, done, strict=True):
            failed += not good
            label = " ".join(f"{name}={value}" for name, value in constants.items())
            print(f"{'ok  ' if good else 'FAIL'} {arch} {family} {label}: {text}", flush=True)
    print(f"{len(jobs) - failed} of {len(jobs)} compiled")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
