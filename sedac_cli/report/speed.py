"""The part of the page about time: speed-up over dense, and how near a step comes to the least time it can take.

speed(run, page); page["tables"]["speed"], page["figures"]["speed"]
"""

from __future__ import annotations

from typing import Any

from sedac_cli.bench.document import floor_note, speed_note, work_label
from sedac_cli.report import plots
from sedac_cli.report.plots import Point
from sedac_cli.report.sources import RunData
from sedac_cli.report.table import Table, milliseconds, share, spread


def speed(run: RunData, page: dict[str, Any]) -> None:
    if run.bench is None:
        return
    rows, ratios, steps = [], [], []
    work = work_label(run.configurations)
    known = any(cell.get("floor") for c in run.configurations for cell in c.get("cells") or [])
    for configuration in run.configurations:
        name = configuration["name"]
        if configuration.get("status") == "crashed" and not configuration.get("cells"):
            error = (configuration.get("errors") or [{}])[0].get("error", "")
            rows.append([name, f"crashed: {error}", *["-"] * (6 if known else 4)])
        for cell in configuration.get("cells") or []:
            label = f"{name}\n{work(cell)}"
            ratio = cell.get("speedup") or {}
            if ratio.get("median") is not None:
                ratios.append(Point(label, 0, ratio["median"], ratio.get("low"), ratio.get("high")))
            floor, ttft, itl = cell.get("floor") or {}, cell.get("ttft_seconds") or {}, cell.get("itl_seconds") or {}
            least, near = floor.get("step_seconds"), (floor.get("share") or {}).get("median")
            if least is not None and near:
                steps.append(Point(label, 1000 * least, 1000 * least / near))
            rows.append(
                [name, work(cell), spread(ratio, "x"), spread(cell.get("tokens_per_second"), ""),
                 milliseconds(ttft.get("p50")), milliseconds(itl.get("p50")),
                 *((milliseconds(least, 3), share(near)) if known else ())]
            )  # fmt: skip
    if rows:
        columns = ["configuration", "work", "speed-up (95 %)", "tokens/s (95 %)", "first token", "between tokens"]
        note = speed_note(run.bench)
        if known:
            columns += ["step floor", "of floor"]
            note += " " + floor_note(run.bench)
        page["tables"]["speed"] = Table(columns, rows, note)
    if ratios:
        page["figures"]["speed"] = plots.speed_figure(ratios)
    if steps:
        page["figures"]["floor"] = plots.floor_figure(steps)
    machine = run.bench.get("machine") or {}
    gpus = ", ".join(str(gpu.get("name")) for gpu in machine.get("gpus") or [])
    page["machine"] = ", ".join(str(x) for x in (machine.get("cpu"), gpus) if x)
    busy, cores = machine.get("busy_before"), machine.get("cores")
    if busy is not None and cores and busy > 0.5:
        page["busy"] = f"{busy:.0%} of the machine was in use by something else when the benchmark began."
