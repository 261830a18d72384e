"""One vLLM engine in a process of its own, driven as a user drives it: `python offline.py JSON`, answer in JSON on the last line."""

from __future__ import annotations

import json
import sys


def join_norms(session) -> None:
    """What a session on CUDA does where it pays: here for what it changes in the model, nothing else."""
    from sedac_cli.vllm.norms import MlpNorm

    found = {layer: MlpNorm.of(session.layers[layer]) for layer in session.gated}
    session.norms = {layer: norm for layer, norm in found.items() if norm is not None}


def main(options: dict) -> dict:
    from vllm import LLM, SamplingParams

    normed = set()
    if options.get("join_norms"):
        from sedac_cli.vllm.session import Session

        norm = Session.norm
        Session.join_norms = join_norms
        Session.norm = lambda self, layer, *rows: normed.add(layer) or norm(self, layer, *rows)
    llm = LLM(**options["engine"])
    sampling = SamplingParams(max_tokens=options.get("tokens", 8), temperature=0, ignore_eos=True, detokenize=False)
    rounds = []
    for off in options.get("force", [None]):
        if off is not None:
            llm.collective_rpc("sedac_force", args=(off,))
        done = llm.generate([{"prompt_token_ids": p} for p in options["prompts"]], sampling, use_tqdm=False)
        rounds.append([list(r.outputs[0].token_ids) for r in done])
    status = llm.collective_rpc("sedac_status") if options.get("gated", True) else None
    spent = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")} if options.get("metrics") else {}
    llm.llm_engine.engine_core.shutdown()
    return {"rounds": rounds, "status": status, "metrics": spent, "normed": sorted(normed)}


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
