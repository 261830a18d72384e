"""Forms of the entropy kernel side by side: how it reads many rows and few, and into how many chunks a warp's share is cut.

    python benchmarks/gpu_entropy_forms.py --out benchmarks/results/gpu_entropy_forms.json

Every form is compared with the plain-torch twin before it is timed; the first is the one in use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]
from cases import CONFIDENCE, ENTROPY_BITS  # noqa: E402
from gpu_timing import buffers, recorded, timed  # noqa: E402
from kernel_sources import fingerprint  # noqa: E402

from sedac_cli.gpu import entropy, reference  # noqa: E402
from sedac_cli.gpu.entropy import FEW, MANY, WARPS, Form, cut, cut_of, fused_entropy  # noqa: E402

VOCAB = 151936
FORMS: dict[str, tuple[Form, Form, int | None]] = {
    "in use": (MANY, FEW, None),
    "many: 4 stages": (Form(1, 4, 3, 4), FEW, None),
    "many: 4 blocks of 3 stages": (Form(1, 4, 4, 3), FEW, None),
    "many: 4 blocks of 2 stages": (Form(1, 4, 4, 2), FEW, None),
    "many: 2 loads at once, 6 stages": (Form(1, 2, 3, 6), FEW, None),
    "many: 8 loads at once, 2 blocks": (Form(1, 8, 2, 3), FEW, None),
    "many: 2 chunks a warp": (MANY, FEW, 2),
    "many: 4 chunks a warp": (MANY, FEW, 4),
    "few: 4 loads at once": (MANY, Form(WARPS, 4, 4), None),
    "few: 3 blocks": (MANY, Form(WARPS, 6, 3), None),
}
"""How many rows are read, how few are, and chunks of a warp where it is not for `cut_of` to say."""


def take(many: Form, few: Form, chunks: int | None) -> None:
    entropy.MANY, entropy.FEW, entropy.cut_of = many, few, cut_of
    if chunks is not None:
        entropy.cut_of = lambda rows, vocab, few, many, decision=False: cut(
            rows, vocab, 1, max(1, chunks * many * WARPS // rows), many
        )


def check(name: str) -> None:
    for rows in (3, 70, 1024):
        logits = torch.randn(rows, VOCAB, device="cuda").bfloat16() * 4
        found, expected = fused_entropy(logits), reference.fused_entropy(logits)
        assert (found.entropy - expected.entropy).abs().max() < ENTROPY_BITS, name
        assert (found.confidence - expected.confidence).abs().max() < CONFIDENCE, name
        assert torch.equal(found.argmax, expected.argmax), name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_entropy_forms.json")
    parser.add_argument("--rows", default="1,8,32,64,256,1024,4096")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    logits = {rows: buffers((rows, VOCAB)) for rows in map(int, chosen.rows.split(","))}
    graphs = {}
    for name, form in FORMS.items():
        take(*form)
        check(name)
        for rows, tensors in logits.items():
            if not name.startswith("many" if rows <= 64 else "few"):
                works = [lambda x=x: fused_entropy(x) for x in tensors]
                graphs[name, rows] = recorded(works, -(-8 // len(works)))
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in FORMS}
    for repeat in range(chosen.repeats + 1):
        for (name, rows), (graph, calls) in graphs.items():
            taken = timed(graph, 3) / calls
            if repeat:  # the first round warms up
                samples[name].setdefault(str(rows), []).append(taken)
    for name, by_rows in samples.items():
        print(f"{name:32}", ", ".join(f"{rows}: {statistics.median(x):.2f}" for rows, x in by_rows.items()), flush=True)
    facts = {
        "command": " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "vocabulary": VOCAB,
        "kernels": fingerprint(),
    }
    chosen.out.write_text(json.dumps(facts | {"microseconds": samples}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
