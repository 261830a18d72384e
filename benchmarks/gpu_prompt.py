"""The prompt pass under a gate, dense beside it, on a GPU: RANDOM weights, so speed only.

    python benchmarks/gpu_prompt.py --out benchmarks/results/gpu_prompt.json [--shape qwen2.5-7b] [--lengths 64,256,1024]

`host`: rows are packed by the host, which waits once where the gate is asked. `device`: rows are packed on the device, nobody waits.
Variants are interleaved round by round, every sample is kept; times are of one whole forward pass of one sequence, by the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from kernel_sources import fingerprint  # noqa: E402

from sedac_cli.runtime import on_device  # noqa: E402
from sedac_cli.runtime.skip import skipping  # noqa: E402
from sedac_cli.shapes import shaped_model  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_prompt.json")
    parser.add_argument("--shape", default="qwen2.5-7b")
    parser.add_argument("--lengths", default="64,128,256,512,1024,4096")
    parser.add_argument("--gates", default="never,always:21,always:14,random:0.25,random:0.5")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    loaded = shaped_model(chosen.shape, chosen.device)
    document = {
        "what": f"shape of {chosen.shape}, random weights: speed only",
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if chosen.device == "cuda" else "none",
        "command": " ".join(sys.argv),
        "kernels": fingerprint(),
        "rows": [],
    }
    for length in map(int, chosen.lengths.split(",")):
        ids = torch.randint(0, loaded.decoder.vocab_size, (1, length), device=loaded.device)
        samples: dict[str, list[float]] = {}
        for number in range(chosen.rounds + 2):
            for gate in chosen.gates.split(","):
                for way, least in (("host", 1 << 30), ("device", 1)):
                    if gate == "never" and way == "device":
                        continue
                    on_device.PACK_FROM = least
                    with torch.inference_mode(), skipping(loaded.model, gate, decoder=loaded.decoder):
                        if chosen.device == "cuda":
                            torch.cuda.synchronize()
                        began = time.perf_counter()
                        loaded.model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
                        took = time.perf_counter() - began
                    if number >= 2:
                        samples.setdefault(gate if gate == "never" else f"{gate} {way}", []).append(took)
        dense = statistics.median(samples["never"])
        for name, times in samples.items():
            document["rows"].append({"length": length, "case": name, "seconds": times})
            print(
                f"{length:>5} {name:<20} {statistics.median(times) * 1e3:7.2f} ms  {dense / statistics.median(times):5.2f}x",
                flush=True,
            )
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
