"""The lm-evaluation-harness with a gate in force: its model class `sedac`, its own command line, and `sedac eval`.

The harness has no way for another package to add a model, so its command line is started by ours:

    python -m sedac_cli.harness --model sedac --model_args pretrained=FOLDER,gate=cascade:thresholds.json --tasks arc_easy

is `lm_eval` with every option of its own. From Python, importing `sedac_cli.harness.model` is enough.
"""

from __future__ import annotations

from sedac_cli.errors import InputError


def require_harness() -> None:
    """The harness is an extra: say so where it is missing."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise InputError("the lm-evaluation-harness is not installed", hint="pip install 'sedac[eval]'")
