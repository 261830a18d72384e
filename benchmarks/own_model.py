"""Distillation on a model and a text that had no part in the making of sedac: train a small Llama from scratch, then distil and validate it.

    python benchmarks/own_model.py --train TRAIN.txt --evaluate OTHER.txt --out FOLDER [--minutes 2] [--distill-minutes 1.5]

The tokenizer (byte-level BPE) and the model are made from TRAIN alone; `sedac distill` sees TRAIN alone; `sedac validate` runs with
the skips in force on OTHER alone. FOLDER keeps the model, every document that the commands printed and `summary.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
END = "<|end|>"


def make_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((text[i : i + 10000] for i in range(0, len(text), 10000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def pretrain(ids: torch.Tensor, args: argparse.Namespace, vocabulary: int) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Next-token training on random windows for the given minutes; learning rate warmed up, then falling to a tenth."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 3, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 128, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    run = torch.compile(model) if device == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    windows = torch.arange(args.window)
    generator = torch.Generator().manual_seed(args.seed)
    began, limit, step, loss = time.monotonic(), args.minutes * 60, 0, torch.tensor(0.0)
    while (passed := (time.monotonic() - began) / limit) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 100) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * passed)))
        starts = torch.randint(0, ids.numel() - args.window, (args.batch, 1), generator=generator)
        batch = ids[starts + windows].to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = run(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 200 == 0:
            print(f"[pretrain] step {step} loss {float(loss):.3f}", file=sys.stderr, flush=True)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()), "steps": step, "tokens": step * args.batch * args.window,
        "last_loss": float(loss.detach()), "text_tokens": ids.numel(),
    }  # fmt: skip
    return model, facts


def sedac(out: Path, name: str, *words: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "sedac_cli", *map(str, words), "--json"]
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": search}, stdout=subprocess.PIPE, text=True)
    document = {"command": command[2:], "exit": done.returncode}
    if done.stdout.strip():
        document["result"] = json.loads(done.stdout)
    (out / f"{name}.json").write_text(json.dumps(document, indent=1))
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.0, help="training of the model from scratch")
    parser.add_argument("--distill-minutes", type=float, default=1.5)
    parser.add_argument("--target-skip", type=float, default=0.28)
    parser.add_argument("--rank", type=int, default=96)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=200, help="sequences to validate on")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.out / "model"
    text = args.train.read_text(encoding="utf-8")
    tokenizer = make_tokenizer(text, args.vocabulary)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    model, facts = pretrain(ids, args, len(tokenizer))
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gates = args.out / "gates.pth"
    made = sedac(
        args.out, "distill", "distill", "--model", folder, "--dataset", args.train, "--max-length", args.window, "--batch-size", 32,
        "--minutes", args.distill_minutes, "--target-skip", args.target_skip, "--rank", args.rank, "--save", gates,
    )  # fmt: skip
    summary: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "model": facts,
        "curve": made.get("result", {}).get("curve"),
    }
    for share in (args.target_skip, 0.5):
        checked = sedac(
            args.out, f"validate_{share}", "validate", "--model", folder, "--dataset", args.evaluate, "--samples", args.samples,
            "--max-length", args.window, "--batch-size", 32, "--gate", f"learned:{gates}@{share}", "--data-dir", args.out,
            "--out", args.out / f"raw_{share}.json",
        )  # fmt: skip
        found = checked.get("result")
        summary[f"validate_{share}"] = found and {
            **found["measures"], "compute_saved": found["reality"]["compute_saved"], "intervals": found["intervals"]
        }  # fmt: skip
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary, indent=1))
    return 0 if summary[f"validate_{args.target_skip}"] else 1


if __name__ == "__main__":
    sys.exit(main())
