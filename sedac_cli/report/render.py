"""The page itself: one HTML file that needs nothing else, made of what `sections` found.

write_report(read_run(folder), folder / "report.html")
"""

from __future__ import annotations

import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sedac_cli.artifacts.files import atomic_file
from sedac_cli.report.sections import build_page
from sedac_cli.report.sources import RunData


def render(run: RunData) -> tuple[str, list[str]]:
    """The page, and what could not be shown on it."""
    page = build_page(run)
    # Figures are SVG of our own making; every other value is text and is escaped.
    page["figures"] = {name: Markup(svg) for name, svg in page["figures"].items()}
    page["made"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    environment = Environment(
        loader=PackageLoader("sedac_cli.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    filled = {
        "machine": "",
        "versions": {},
        "commands": [],
        "settings": [],
        "whole": "",
        "busy": "",
        "layers_told": "",
    } | page
    return environment.get_template("page.html").render(page=filled), page["problems"]


def write_report(run: RunData, path: Path) -> list[str]:
    text, problems = render(run)
    with atomic_file(path) as handle:
        handle.write(text.encode("utf-8", "replace"))
    return problems
