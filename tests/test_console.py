"""What a person reads in a table."""

from __future__ import annotations

from sedac_cli.console import Output


def test_a_table_too_wide_for_its_place_loses_no_letter(capsys):
    names = [f"stability:threshold=0.{n},patience=3" for n in range(3)]
    Output().table("t", ["gate", *"abcdefgh"], [[name, *["0.123456789 (0.1 .. 0.2)"] * 8] for name in names])
    shown = capsys.readouterr().out
    cells = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert "".join(cells) == "".join(names)
    assert max(map(len, shown.splitlines())) <= 140
