"""What `generate` and `validate` can add to any gate while it runs: adaptive thresholds and deep thinking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from sedac_cli.commands._common import option
from sedac_cli.config import parse_rates
from sedac_cli.console import Output
from sedac_cli.errors import UsageError

if TYPE_CHECKING:
    from sedac_cli.gates.deep import DeepThinking
    from sedac_cli.runtime.plan import Plan

Adaptive = Annotated[
    str | None,
    option("Online", "--adaptive", help="Thresholds find themselves for these exit rates: 0.2,0.6,0.9 (probe gates)."),
]
CalibrationSteps = Annotated[
    int | None,
    option("Online", "--calibration-steps", min=1, help="Tokens a checkpoint sees before it lets any go; default 50."),
]
DeepThreshold = Annotated[
    float | None,
    option("Online", "--deep-threshold", min=0, help="Run tokens with more bits of final entropy again, whole."),
]
DeepRounds = Annotated[
    int | None, option("Online", "--deep-rounds", min=1, help="At most so often; from the second with all before them.")
]


@dataclass(frozen=True)
class Online:
    """What was asked for; `rates` None: thresholds stay as they are."""

    rates: list[float] | None
    calibration_steps: int
    deep: DeepThinking | None

    def adapt(self, plan: Plan) -> None:
        """Put adaptive thresholds into the plan's gate."""
        from sedac_cli.runtime.plan import adapt

        if self.rates is not None:
            adapt(plan, self.rates, self.calibration_steps)


def read_online(adaptive: str | None, steps: int | None, threshold: float | None, rounds: int | None) -> Online:
    """Refuses what makes no sense together; no model is needed for that."""
    from sedac_cli.gates.deep import DeepThinking

    if adaptive is None and steps is not None:
        raise UsageError("--calibration-steps goes with adaptive thresholds", hint="--adaptive 0.2,0.6,0.9")
    if threshold is None and rounds is not None:
        raise UsageError("--deep-rounds: above which entropy?", hint="--deep-threshold 4.5")
    rates = None if adaptive is None else parse_rates(adaptive, "adaptive")
    deep = None if threshold is None else DeepThinking(threshold, 1 if rounds is None else rounds)
    return Online(rates, 50 if steps is None else steps, deep)


def show_adaptive(out: Output, rows: list[dict[str, Any]] | None) -> None:
    if rows is None:
        return
    out.table(
        "adaptive thresholds, as they ended",
        ["layer", "threshold", "target rate", "exit rate", "tokens that reached it"],
        [
            [row["layer"], f"{row['threshold']:.4f}", f"{row['target']:.1%}",
             "-" if row["rate"] is None else f"{row['rate']:.1%}", f"{row['tokens']:,}"]
            for row in rows
        ],
        caption="exit rate: of the tokens that reached the checkpoint once it had seen enough to let any go",
    )  # fmt: skip
