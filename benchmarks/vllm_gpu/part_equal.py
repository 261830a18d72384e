"""Where nothing may differ, and where little may.

exact     gate off: token ids and log-probabilities are those of plain vLLM, to the bit; so are those of a gate that runs every
          MLP, against plain vLLM with the activation kernel that a gated MLP uses; metrics right after a run
quality   a trained model with its gate in vLLM against the Hugging Face runtime: perplexity ratio and agreement on the same tokens
families  other architectures, small and random: tokens, log-probabilities and skips against the Hugging Face runtime
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import HERE, Engine, FailedError, Lab, Spec, TooLateError
from shapes import spread

ONE_BY_ONE = {"compilation": {"cudagraph_capture_sizes": [1]}}
"""Rows that share a graph share its MLPs. Where each row must be judged for itself, prompts run without one."""
PROMPTS = [[(7 * i * i + 13 * i + 31 * k) % 2000 + 5 for i in range(24 + 9 * k)] for k in range(4)]


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """How two engines' outputs differ: log-probabilities are compared as far as the tokens are the same."""
    same = sum(x == y for p, q in zip(a["tokens"], b["tokens"], strict=True) for x, y in zip(p, q, strict=True))
    total = sum(len(p) for p in a["tokens"])
    prompts = [
        abs(x - y)
        for p, q in zip(a["prompt_logprobs"], b["prompt_logprobs"], strict=True)
        for x, y in zip(p, q, strict=True)
    ]
    return {
        "identical": all(a[key] == b[key] for key in a.keys() & b.keys() if key in ("tokens", "logprobs", "prompt_logprobs")),
        "same_tokens": same / total, "mean_prompt_difference": sum(prompts) / max(1, len(prompts)),
        "largest_prompt_difference": max(prompts, default=0.0),
    }  # fmt: skip


def exact(lab: Lab) -> None:
    """On weights that say something: with vLLM's dummy ones an MLP adds so little that taking it away changes no output."""
    more = small_engine(lab, small(lab, "qwen2")[0]) if lab.args.model is None else trained(lab)
    layers = json.loads((Path(more["model"]) / "config.json").read_text())["num_hidden_layers"]
    half = spread(layers, 0.5)
    got: dict[str, dict[str, Any]] = {}
    ask = {"new": lab.args.tokens, "count": 6, "length": 70}
    specs = [lab.plain("exact-plain", **more), lab.fused("exact-silu", **more)]
    specs += [lab.spec("exact-never", {"gate": "never"}, **more)]
    specs += [lab.forced(way, f"exact-{way}", **more) for way in ("nodes", "kernels")]
    if not lab.args.alone:
        lab.those_that_start(specs)
    for spec in specs:
        try:
            engine = lab.engine(spec)
            if spec.forced:
                lab.ask(engine, "force", off=[])
            name = spec.name.removeprefix("exact-")
            got[name] = lab.ask(engine, "output", **ask)
            if name == "nodes":
                lab.ask(engine, "force", off=half)
                got["opted out"] = lab.ask(engine, "output", extra={"sedac": 0}, **ask)
                got["half off"] = lab.ask(engine, "output", **ask)
                metrics(lab, engine, half)
        except (FailedError, TooLateError) as error:
            lab.problem(f"exact, {spec.name}: {error}")
    for name, against in (
        ("never", "plain"), ("nodes", "silu"), ("opted out", "silu"), ("kernels", "silu"), ("silu", "plain"), ("half off", "silu"),
    ):  # fmt: skip
        if name in got and against in got:
            lab.add(engine=name, against=against, **difference(got[name], got[against]))
    lab.stop_all()


def metrics(lab: Lab, engine: Engine, off: list[int]) -> None:
    """Counters right after a run, and what Prometheus is told within two seconds."""
    requests, prompt, new = 4, 40, 16
    lab.ask(engine, "counts", reset=True)
    time.sleep(2.2)
    before = lab.ask(engine, "metrics")["metrics"]
    lab.ask(engine, "throughput", requests=requests, prompt=prompt, new=new)
    status = lab.ask(engine, "counts")["status"][0]
    time.sleep(2.2)
    after = lab.ask(engine, "metrics")["metrics"]

    def grown(name: str) -> float:
        return sum(v - before.get(k, 0.0) for k, v in after.items() if k.startswith(name + "{"))

    least = requests * (prompt + new - 1)
    skipped = {layer: count for layer, count in enumerate(status["skipped"]) if count}
    lab.add(
        engine=engine.name, what="metrics", tokens=status["tokens"], tokens_at_least=least, tokens_at_most=least + requests,
        counted=least <= status["tokens"] <= least + requests,
        exactly_the_layers_off=skipped == dict.fromkeys(off, status["tokens"]),
        prometheus_agrees=grown("sedac_calls_total") == status["tokens"]
        and grown("sedac_mlps_skipped_total") == sum(status["skipped"]),
        prometheus={k: v - before.get(k, 0.0) for k, v in after.items() if "exits" not in k},
    )  # fmt: skip


def reference(lab: Lab, name: str, limit: float, **ask: Any) -> Any:
    question, answer = lab.work / f"{name}.ask.json", lab.work / f"{name}.answer.json"
    question.write_text(json.dumps(ask))
    log = lab.work / f"reference-{name}.log"
    with log.open("w") as out:
        try:
            subprocess.run(
                [sys.executable, str(HERE / "reference.py"), str(question), str(answer)], stdout=out, stderr=out,
                timeout=max(5.0, min(limit, lab.left())), check=True, env=lab.environment(lab.plain()),
            )  # fmt: skip
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise FailedError(f"reference {name}: {error}\n" + "\n".join(log.read_text().splitlines()[-15:])) from None
    return json.loads(answer.read_text())


def quality(lab: Lab) -> None:
    """The trained model's own tokens; vLLM scores what `sedac validate`'s runtime ran."""
    args = lab.args
    if args.model is None or args.gate_file is None or args.text is None:
        raise FailedError("quality needs --model, --gate-file and --text")
    found: dict[str, Any] = {}
    for share in [float(x) for x in args.gate_shares.split(",")]:
        gate = f"learned:{args.gate_file}@{share}"
        more = trained(lab) | ONE_BY_ONE
        specs = [lab.plain("plain-trained", **more), lab.spec(f"learned-trained-{share}", {"gate": gate}, **more)]
        if not args.alone:
            lab.engines([spec for spec in specs if spec.name not in found])
        hf = reference(
            lab, f"validate-{share}", 240, do="validate", model=str(args.model), gate=gate, text=str(args.text),
            samples=args.samples, length=512, dtype=args.dtype,
        )  # fmt: skip
        samples = hf.pop("samples")
        scored = {}
        for spec in specs:
            if spec.name in found:
                scored[spec.name] = found[spec.name]
                continue
            engine = lab.engine(spec)
            lab.ask(engine, "counts", reset=True)
            scored[spec.name] = lab.ask(engine, "score", within=240, prompts=samples)
            scored[spec.name]["status"] = lab.ask(engine, "counts")["status"]
        plain, own = (scored[spec.name] for spec in specs)
        found[specs[0].name] = plain
        mine = measures(plain, own)
        status = own["status"][0]
        row = {
            "share": share, "vllm": mine | {"skip_ratio": status["skip_ratio"]}, "hf": hf["measures"], "packs": status.get("packs"),
            "ppl_ratio_difference": mine["ppl_ratio"] - hf["measures"]["ppl_ratio"],
            "agreement_difference": mine["agreement"] - hf["measures"]["agreement"], "intervals": hf["intervals"],
            "per_sequence": {"hf": hf["per_sequence"], "vllm_dense": sums(plain), "vllm_own": sums(own)},
        }  # fmt: skip
        row["within_0.01"] = abs(row["ppl_ratio_difference"]) < 0.01 and abs(row["agreement_difference"]) < 0.01
        lab.add(**row)
        lab.stop(specs[1].name)


def trained(lab: Lab) -> dict[str, Any]:
    """What vLLM is told of the model that was named."""
    config = json.loads((lab.args.model / "config.json").read_text())
    return with_room(lab, {
        "model": str(lab.args.model), "load_format": "auto", "vocab_size": config["vocab_size"], "max_model_len": 1024,
        "dtype": lab.args.dtype,
    })  # fmt: skip


def small_engine(lab: Lab, folder: Path) -> dict[str, Any]:
    return with_room(lab, {"model": str(folder), "load_format": "auto", "vocab_size": 2048, "max_model_len": 512})


def with_room(lab: Lab, more: dict[str, Any]) -> dict[str, Any]:
    return more | ({"kv_cache_memory_bytes": 2**30} if lab.args.kv_gib else {})


def sums(scored: dict[str, Any]) -> list[float]:
    return [round(-sum(row), 4) for row in scored["logprobs"]]


def measures(dense: dict[str, Any], own: dict[str, Any]) -> dict[str, float]:
    count = sum(len(row) for row in own["logprobs"])
    nll = [-sum(sum(row) for row in side["logprobs"]) / count for side in (dense, own)]
    same = sum(x == y for p, q in zip(dense["best"], own["best"], strict=True) for x, y in zip(p, q, strict=True))
    return {"ppl_dense": math.exp(nll[0]), "ppl_ratio": math.exp(nll[1] - nll[0]), "agreement": same / count}


def families(lab: Lab) -> None:
    ready: dict[str, tuple[dict[str, Spec], dict[str, Any]]] = {}

    def attempt(family: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (FailedError, TooLateError) as error:
            lab.problem(f"families, {family}: {error}")
            lab.check(30)

    for family in lab.args.families.split(","):
        if (found := attempt(family, lambda family=family: one_family(lab, family))) is not None:
            ready[family] = found
    if not lab.args.alone:
        lab.start_once([spec for specs, _ in ready.values() for spec in specs.values()])
    for family, (specs, hf) in ready.items():
        for name, spec in specs.items():
            attempt(family, lambda family=family, name=name, spec=spec, hf=hf: one_gate(lab, family, name, spec, hf))


def small(lab: Lab, family: str, layers: int = 8, hidden: int = 512) -> tuple[Path, dict[str, Any]]:
    folder = lab.work / f"small-{family}"
    made = reference(
        lab,
        f"make-{family}",
        300,
        do="make",
        family=family,
        folder=str(folder),
        layers=layers,
        hidden=hidden,
        prompts=PROMPTS,
    )
    return folder, made


def one_family(lab: Lab, family: str) -> tuple[dict[str, Spec], dict[str, Any]]:
    """Its engines, one per gate, and what Hugging Face says with each gate."""
    folder, made = small(lab, family)
    cascade = {
        "probe_dir": str(folder), "probe_layers": made["checkpoints"], "adaptive": False, "thresholds": made["thresholds"],
    }  # fmt: skip
    gates = {"forced": {"gate": "forced:1/3/6"}, "cascade": cascade, "never": {"gate": "never"}}
    ask = {"model": str(folder), "dtype": "bfloat16", "gates": gates, "prompts": PROMPTS, "new": 8}
    hf = reference(lab, f"tokens-{family}", 300, do="tokens", **ask)
    specs = {
        name: lab.spec(f"{family}-{name}", gates[name], **(small_engine(lab, folder) | ONE_BY_ONE))
        for name in ("forced", "cascade")
    }
    return specs, hf


def one_gate(lab: Lab, family: str, name: str, spec: Spec, hf: dict[str, Any]) -> None:
    engine = lab.engine(spec)
    lab.ask(engine, "counts", reset=True)
    # One prompt at a time: the rows of one graph share an MLP, and here each must be its own.
    parts = [lab.ask(engine, "output", prompts=[prompt], new=8) for prompt in PROMPTS]
    own = {key: [part[key][0] for part in parts] for key in ("tokens", "prompt_logprobs")}
    status = lab.ask(engine, "counts")["status"][0]
    effect = difference(hf[name], hf["never"])["mean_prompt_difference"]
    lab.add(
        family=family, gate=name, effect_of_the_gate=effect, skipped=status["skipped"], hf_skipped=hf[name]["skipped"],
        **difference(own, hf[name]),
    )  # fmt: skip
    lab.stop(engine.name)
