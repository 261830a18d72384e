"""Greedy tokens of the graph engine against the eager runtime, over many prompts of real text, in float32 and bfloat16.

    python benchmarks/graph_exactness.py --model MODELS/qwen2-small --text DATA/mixed-evaluation.txt --out OUT/exactness.json

A text is compared up to its first differing token: after it, the two continue different texts. What counts is the share of
choices that agree where both had the same text before them. For each difference the gap between the two tokens' logits at that
place, under the same gate, is kept, beside what one rounding to the dtype is worth there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from kernel_sources import fingerprint  # noqa: E402

from sedac_cli.config import ModelSpec  # noqa: E402
from sedac_cli.models import load_model  # noqa: E402
from sedac_cli.runtime.generate import GenerateOptions, generate  # noqa: E402
from sedac_cli.runtime.graph import GraphEngine  # noqa: E402
from sedac_cli.runtime.plan import make_plan  # noqa: E402
from sedac_cli.runtime.skip import skipping  # noqa: E402


def compare(model: str, dtype: str, gate: str, prompts: list[str], new: int, batch: int) -> dict:
    loaded = load_model(ModelSpec(ref=model, device="cuda", dtype=dtype))
    plan = make_plan(gate, loaded.decoder, loaded.identity)
    engine = GraphEngine(loaded, plan, batch=batch, max_length=256 + new)
    options = GenerateOptions(max_new_tokens=new, ignore_eos=True)
    same = total = whole = 0
    gaps = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        ours, theirs = engine.generate(some, options), generate(loaded, plan.gate, some, options, plan.standin)
        for prompt, a, b in zip(some, ours.tokens, theirs.tokens, strict=True):
            x, y = [t.token for t in a], [t.token for t in b]
            first = next((i for i in range(len(y)) if x[i] != y[i]), len(y))
            total, same, whole = total + len(y), same + first, whole + (first == len(y))
            if first < len(y):
                ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"].cuda()
                ids = torch.cat([ids, torch.tensor([y[:first]], device="cuda", dtype=ids.dtype)], dim=1)
                gated = skipping(loaded.model, plan.gate, plan.standin, decoder=loaded.decoder)
                with torch.inference_mode(), gated:
                    logits = loaded.model(input_ids=ids).logits[0, -1].float()
                gap = float(logits[y[first]] - logits[x[first]])
                gaps.append({"gap": gap, "rounding": float(logits.max()) * torch.finfo(loaded.model.dtype).eps})
    line = {
        "dtype": dtype, "gate": gate, "path": engine.path, "prompts": len(prompts), "texts_equal": whole, "tokens": total,
        "tokens_equal_up_to_first_difference": same, "choices_agree": same / (same + len(gaps)), "differences": gaps,
    }  # fmt: skip
    print(
        f"{dtype} {gate} ({engine.path}): {whole} of {len(prompts)} texts equal; {same} of {same + len(gaps)} "
        f"choices from equal text agree"
    )
    for one in gaps[:8]:
        print(f"   differing logits are {one['gap']:.4f} apart, one rounding there is {one['rounding']:.4f}")
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--gates", default="never,always:20")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    words = chosen.text.read_text(encoding="utf-8").split()
    step = max(60, len(words) // chosen.prompts)
    prompts = [" ".join(words[i * step : i * step + 12 + i % 30]) for i in range(chosen.prompts)]
    torch.set_grad_enabled(False)
    # Rows of a batch share the MLP that one of them needs, so gates that differ by row are compared one prompt at a time.
    lines = [
        compare(chosen.model, dtype, gate, prompts, chosen.new, chosen.batch)
        for dtype in chosen.dtypes.split(",")
        for gate in chosen.gates.split(",")
    ]
    chosen.out.write_text(
        json.dumps(
            {
                "command": " ".join(sys.argv),
                "gpu": torch.cuda.get_device_name(),
                "kernels": fingerprint(),
                "lines": lines,
            },
            indent=1,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
