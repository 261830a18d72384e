"""Figures as inline SVG: drawn by matplotlib, coloured by the page, so that one drawing serves light, dark and paper.

matplotlib rather than plotly or vega: a figure is 10-40 kB instead of a 4 MB script, prints as vectors, and needs neither
network nor JavaScript to be seen.

    svg = curve_figure([Line("distill", [0.1, 0.3], [1.0, 1.1])], [], "ppl ratio")
"""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

INK, GRID = "#010203", "#040506"
"""Stand for the page's own colours; replaced by CSS variables."""
COLORS = ("#2f7fd6", "#d9702b", "#2f9e6e", "#a05fd0", "#c0436b", "#8a8f2a")
SHAPES = "Ds^vP*Xdph"
_figures = count(1)


@dataclass(frozen=True)
class Line:
    name: str
    x: Sequence[float]
    y: Sequence[float]
    marked: Sequence[bool] | None = None
    """Filled markers; the others are hollow. None: no markers are special."""


@dataclass(frozen=True)
class Point:
    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def _figure(height: float = 2.9) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update(
        {
            "svg.fonttype": "none", "svg.hashsalt": "sedac", "font.family": "sans-serif", "font.size": 9.5,
            "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK,
            "grid.color": GRID, "axes.grid": True, "grid.linewidth": 0.6, "axes.spines.top": False,
            "axes.spines.right": False, "legend.frameon": False, "axes.axisbelow": True,
        }
    )  # fmt: skip
    figure = Figure(figsize=(4.3, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    """The drawing without its XML head, ids made the page's own, colours left to the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = f"f{next(_figures)}-"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}\1"', text)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    # Sizes are the page's: the drawing keeps its shape by its viewBox.
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    safe = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{head} role="img" aria-label="{safe}">{rest}'


def curve_figure(
    lines: Sequence[Line],
    points: Sequence[Point],
    ylabel: str,
    reference: float | None = 1.0,
    limit: float | None = None,
) -> str:
    """Skip against quality: lines for what was swept, points with their intervals for what was measured, and dense, at
    0 % and 1, so that distances can be judged."""
    figure, axes = _figure(2.9 + 0.17 * (len(lines) + len(points)) / 2)
    axes.plot([0], [1], color=INK, marker="o", markersize=5, markerfacecolor="none", linestyle="", label="dense")
    colors = iter(COLORS * 4)
    for line in lines:
        order = sorted(range(len(line.x)), key=lambda i: line.x[i])
        x, y = [100 * line.x[i] for i in order], [line.y[i] for i in order]
        color = next(colors)
        axes.plot(x, y, color=color, linewidth=1.6, label=line.name, marker="o", markersize=3.2, markerfacecolor=color)
        if line.marked is not None:
            hollow = [i for i in range(len(order)) if not line.marked[order[i]]]
            axes.plot(
                [x[i] for i in hollow], [y[i] for i in hollow], linestyle="", marker="x", color=COLORS[4], markersize=6,
                label="not certified",
            )  # fmt: skip
    for point, shape in zip(points, SHAPES * 3, strict=False):
        color = next(colors)
        if point.low is not None and point.high is not None:
            spread = [[max(0.0, point.y - point.low)], [max(0.0, point.high - point.y)]]
            axes.errorbar(
                [100 * point.x], [point.y], yerr=spread, color=color, marker=shape, capsize=3, linestyle="",
                markersize=6, label=point.name,
            )  # fmt: skip
        else:
            axes.plot(
                [100 * point.x], [point.y], color=color, marker=shape, linestyle="", markersize=6, label=point.name
            )
    if reference is not None:
        axes.axhline(reference, color=INK, linewidth=0.8, linestyle=":")
    if limit is not None:
        axes.axhline(limit, color=COLORS[4], linewidth=1, linestyle="--", label=f"promised: {limit:g}")
    axes.set_xlabel("MLPs skipped, %")
    axes.set_ylabel(ylabel)
    axes.margins(0.08)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    told = "; ".join(f"{p.name}: {100 * p.x:.1f} % skipped, {p.y:.4f}" for p in points)
    return _svg(figure, f"{ylabel} against the share of MLPs skipped. {told}")


def layer_lines_figure(rates: Mapping[str, Sequence[float]]) -> str:
    """Share of tokens that skip, by layer, a line for each configuration."""
    figure, axes = _figure(2.9)
    for (name, row), color, shape in zip(rates.items(), COLORS * 3, SHAPES * 2, strict=False):
        axes.plot(
            range(len(row)), [100 * r for r in row], color=color, marker=shape, markersize=3, linewidth=1.2, label=name
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("tokens that skip its MLP, %")
    axes.legend(fontsize=8)
    return _svg(figure, "share of tokens that skip the MLP, by layer and configuration")


def layers_figure(real: Sequence[float], other: Sequence[float] | None, name: str) -> str:
    figure, axes = _figure(2.5)
    layers = range(len(real))
    axes.bar(layers, [100 * r for r in real], color=COLORS[0], width=0.8, label="with the skips in force")
    if other is not None:
        axes.plot(
            layers, [100 * r for r in other], color=COLORS[1], marker="o", markersize=2.5, linewidth=1, label=name
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("tokens that skip its MLP, %")
    axes.legend(fontsize=8)
    axes.grid(axis="x", visible=False)
    return _svg(figure, "share of tokens that skip the MLP, by layer")


def shares_figure(values: dict[int, list[float]], limits: dict[int, float], kind: str) -> str:
    """For each layer that decides: the share of tokens that would skip there, by threshold; the chosen one is marked."""
    figure, axes = _figure()
    chosen = sorted(values)
    if len(chosen) > 6:  # a router in every layer: show some, evenly
        chosen = [chosen[round(i * (len(chosen) - 1) / 5)] for i in range(6)]
    for layer, color, shape in zip(chosen, COLORS, SHAPES, strict=False):
        row = sorted(values[layer])
        shares = [100 * (i + 1) / len(row) for i in range(len(row))]
        if kind == "score":  # a router: the MLP is skipped where the score is above the limit
            shares = [100 - share for share in shares]
        axes.plot(row, shares, color=color, linewidth=1.5, drawstyle="steps-post")
        if layer in limits:
            below = bisect_right(row, limits[layer]) / len(row)
            now = 100 * (1 - below if kind == "score" else below)
            axes.axvline(limits[layer], color=color, linewidth=1, linestyle="--")
            axes.plot(
                [limits[layer]],
                [now],
                color=color,
                marker=shape,
                markersize=7,
                linestyle="",
                label=f"layer {layer}: {now:.0f} %",
            )
        else:
            axes.plot(
                [row[-1]], [shares[-1]], color=color, marker=shape, markersize=5, linestyle="", label=f"layer {layer}"
            )
    axes.set_xlabel(f"threshold on the {kind}")
    axes.set_ylabel("tokens that would skip, %")
    axes.legend(fontsize=8)
    return _svg(figure, f"share of tokens that would skip, by threshold on the {kind}")


def speed_figure(points: Sequence[Point]) -> str:
    """Speed-up over dense by configuration and work, with the spread of the pairs."""
    figure, axes = _figure(max(1.6, 0.7 + 0.34 * len(points)))
    places = range(len(points))[::-1]
    for place, point in zip(places, points, strict=True):
        color = COLORS[2] if point.y >= 1 else COLORS[4]
        axes.barh(place, point.y - 1, left=1, color=color, height=0.6, alpha=0.85)
        if point.low is not None and point.high is not None:
            axes.plot([point.low, point.high], [place, place], color=INK, linewidth=1.1)
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_yticks(list(places), [point.name for point in points])
    axes.set_xlabel("speed-up over dense (1 = as fast)")
    axes.grid(axis="y", visible=False)
    return _svg(figure, "speed-up over dense by configuration")


def floor_figure(points: Sequence[Point]) -> str:
    """Milliseconds of a decode step (`y`) beside the least it could take (`x`), by configuration and work."""
    figure, axes = _figure(max(1.8, 0.9 + 0.34 * len(points)))
    places = list(range(len(points)))[::-1]
    axes.barh(places, [point.y for point in points], color=COLORS[0], height=0.6, alpha=0.85, label="a step took")
    axes.plot([point.x for point in points], places, color=INK, marker="|", markersize=13, linestyle="", label="floor")
    axes.set_yticks(places, [point.name for point in points])
    axes.set_xlabel("milliseconds of a decode step")
    axes.grid(axis="y", visible=False)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return _svg(figure, "time of a decode step beside its floor, by configuration")
