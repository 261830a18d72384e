"""The examples of docs/python.md run as they stand, each on its own."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

EXAMPLES = re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S | re.M)


def test_every_block_of_the_page_is_an_example():
    assert len(EXAMPLES) == (ROOT / "docs" / "python.md").read_text().count("```python") > 4


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_runs(title, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, title, "exec"), {})
    assert capsys.readouterr().out.strip()
    assert not list(tmp_path.iterdir())
