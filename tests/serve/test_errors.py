"""What clients are told of a batch that failed."""

from __future__ import annotations

import pytest

from sedac_cli.errors import InputError
from sedac_cli.serve.errors import failed


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (InputError("the settings hold min_p = 0.1", hint="--backend eager"), 400, "the settings hold min_p = 0.1"),
        (MemoryError(), 503, "ran out of memory"),
        (ValueError("secret of the house"), 500, "generation failed: ValueError"),
    ],
)
def test_whose_fault_it_was(error, status, says):
    told = failed(error)
    assert told.status == status
    assert says in told.message
    assert "secret" not in told.message
