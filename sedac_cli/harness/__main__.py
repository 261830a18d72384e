"""`python -m sedac_cli.harness ...`: the harness's own command line, with `--model sedac` known to it."""

from __future__ import annotations

import sys

from sedac_cli.console import report_error
from sedac_cli.errors import SedacError
from sedac_cli.harness import require_harness


def main() -> int:
    try:
        require_harness()
        import lm_eval.__main__

        import sedac_cli.harness.model  # noqa: F401  its class registers itself

        lm_eval.__main__.cli_evaluate()
    except SedacError as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
