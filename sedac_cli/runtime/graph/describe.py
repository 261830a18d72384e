"""What a run of the graph engine made, in the form every engine answers in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sedac_cli.models import LoadedModel
from sedac_cli.runtime.generate import Generated, TokenDecision

if TYPE_CHECKING:
    from sedac_cli.runtime.graph.call import Run


def describe(loaded: LoadedModel, run: Run, mask: Tensor, ends: set[int]) -> Generated:
    layers = loaded.decoder.num_layers
    rows = run.first.shape[0]
    skipped = layers - run.ran.sum(dim=1) if run.steps else torch.zeros(0, dtype=torch.long)
    exits = exit_layers(run.ran)
    prompt_skipped = torch.zeros(rows, dtype=torch.long)
    prompt_exit = torch.full((rows,), layers)
    prompt_all = torch.zeros(rows, dtype=torch.long)
    if run.prompt is not None:
        prompt_skipped, prompt_exit = run.prompt.skipped[:, -1].cpu(), run.prompt.exit_layer[:, -1].cpu()
        prompt_all = (run.prompt.skipped * run.prompt.real).sum(dim=1).cpu()
    texts, decided = [], []
    for row in range(rows):
        ids = [int(run.first[row]), *run.tokens[:, row].tolist()]
        length = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1) + 1
        texts.append(loaded.tokenizer.decode(ids[:length], skip_special_tokens=True))
        counts = [int(prompt_skipped[row]), *skipped.tolist()]
        places = [int(prompt_exit[row]), *exits.tolist()]
        decided.append(
            [TokenDecision(loaded.tokenizer.decode([ids[i]]), ids[i], counts[i], places[i]) for i in range(length)]
        )
    everything = [token for row in decided for token in row]
    after = [token for row in decided for token in row[1:]]
    lengths = mask.sum(dim=1).tolist()
    prompt_tokens = sum(lengths)
    gone = [int(prompt_all[i]) + sum(token.skipped for token in row[1:]) for i, row in enumerate(decided)]
    dense = [(length + len(row) - 1) * layers for length, row in zip(lengths, decided, strict=True)]
    later = sum(token.skipped for token in after)
    total = run.prefill_seconds + run.decode_seconds
    return Generated(
        texts=texts,
        tokens=decided,
        prompt_tokens=prompt_tokens,
        new_tokens=len(everything),
        prefill_seconds=run.prefill_seconds,
        decode_seconds=run.decode_seconds,
        tokens_per_second=len(everything) / total,
        decode_tokens_per_second=len(after) / run.decode_seconds if after else 0.0,
        skip_ratio=sum(gone) / max(1, sum(dense)),
        skip_ratio_decode=later / max(1, len(after) * layers),
        average_exit_layer=sum(token.exit_layer for token in everything) / max(1, len(everything)),
        num_layers=layers,
        skip_ratios=[skipped / max(1, of) for skipped, of in zip(gone, dense, strict=True)],
    )


def exit_layers(ran: Tensor) -> Tensor:
    """[steps]: the first layer whose MLP was skipped, or the number of layers."""
    layers = ran.shape[1]
    first = (~ran).int().argmax(dim=1)
    return torch.where(ran.all(dim=1), layers, first)
