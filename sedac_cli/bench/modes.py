"""The ways a configuration can run, by the names people write into a matrix.

mode = find_mode("ngram_sedac_adaptive")      # drafts from the text, then from the gated model; the full model verifies
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sedac_cli.errors import UsageError, did_you_mean

Draft = Literal["gate", "ngram", "suffix", "ngram_gate", "suffix_gate"]


@dataclass(frozen=True)
class Mode:
    """`gated`: a gate acts on what is emitted. `loop`: the lossless loop, with drafts from `draft` if any."""

    name: str
    summary: str
    gated: bool = False
    loop: bool = False
    draft: Draft | None = None
    adaptive: bool = False

    @property
    def needs_gate(self) -> bool:
        return self.gated or (self.draft or "").endswith("gate")


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("dense", "the stock model, nothing installed in it"),
        Mode("gated", "the gate decides what is computed; quality is measured", gated=True),
        Mode("gated_adaptive", "gated, with thresholds that keep target exit rates", gated=True, adaptive=True),
        Mode("loop", "the lossless loop without drafts: what the loop itself costs or saves", loop=True),
        Mode("lossless", "the gated model drafts, the full model verifies", loop=True, draft="gate"),
        Mode("lossless_adaptive", "lossless, draft length from the running acceptance", loop=True, draft="gate", adaptive=True),
        Mode("ngram", "drafts copied from earlier in the text", loop=True, draft="ngram"),
        Mode("ngram_adaptive", "ngram, draft length from the running acceptance", loop=True, draft="ngram", adaptive=True),
        Mode("suffix", "drafts after the longest earlier match", loop=True, draft="suffix"),
        Mode("ngram_sedac", "drafts from the text where it matches, else from the gated model", loop=True, draft="ngram_gate"),
        Mode("ngram_sedac_adaptive", "ngram_sedac, draft lengths from the running acceptance of each",
             loop=True, draft="ngram_gate", adaptive=True),
        Mode("suffix_sedac_adaptive", "as ngram_sedac_adaptive, with the longest earlier match",
             loop=True, draft="suffix_gate", adaptive=True),
    )
}  # fmt: skip

# Names that matrices of earlier versions use for the same.
ALIASES = {
    "vanilla": "dense", "baseline": "dense", "sedac": "gated", "sedac_adaptive": "gated_adaptive",
    "sedac_lossless": "lossless", "self_speculative": "lossless",
}  # fmt: skip


def find_mode(name: str) -> Mode:
    known = ALIASES.get(name, name)
    if known not in MODES:
        raise UsageError(
            f"there is no mode '{name}'.{did_you_mean(name, [*MODES, *ALIASES])}", hint="modes: " + ", ".join(MODES)
        )
    return MODES[known]
