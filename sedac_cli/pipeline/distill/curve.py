"""The curve skip -> quality of trained gates, on text that was not trained on, in one table of limits.

rows = measure_curve(trainer, held, shares=(0.1, 0.25, 0.5))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedac_cli.gpu.reference import kl_of_logits, row_chunks
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline.distill.budget import BudgetTable
from sedac_cli.pipeline.distill.train import Trainer

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
BATCH = 16


@torch.no_grad()
def measure_curve(trainer: Trainer, held: Tensor, shares: tuple[float, ...] = SHARES) -> list[dict[str, float]]:
    """For each share: the limit, the share really skipped, ppl ratio, agreement and KL (nats) on held-out windows.

    Scores move when earlier layers skip, so a limit is set twice: from the dense scores, then from the gated ones.
    """
    decoder, device = trainer.decoder, trainer.device
    shares = tuple(s for s in shares if s <= 0.97 * trainer.table.ceiling)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    batches = [ids.long().to(device) for ids in held.split(BATCH)]
    with trainer.form() as control, autocast:
        control.on = False
        dense = [decoder.last_hidden(ids) for ids in batches]
        control.on, control.noise = True, torch.zeros((), device=device)
        rows = []
        # As long as the training, on a CPU: who watches must see it move.
        for share in trainer.progress(shares, desc="curve", unit="budget"):
            table = BudgetTable(len(trainer.layers), decoder.num_layers, device, smoothing=0.5)
            table.gain = trainer.table.gain.clone()
            table.table, table.seen, table.usable = trainer.table.table.clone(), 1, trainer.table.usable
            wanted = torch.full((BATCH,), share, device=device)
            for ids in batches[:6]:
                control.start(table.limits(wanted[: ids.shape[0]]))
                decoder.last_hidden(ids)
                got = (control.scores() > control.limit).float().mean() * table.ceiling
                table.update(control.scores())
                table.correct(wanted.mean(), got)
            limit = float(table.limits(wanted[:1]))
            sums = torch.zeros(5, dtype=torch.float64, device=device)
            for ids, before in zip(batches, dense, strict=True):
                control.start(torch.full((ids.shape[0], 1), limit, device=device))
                after = decoder.last_hidden(ids)
                skipped = (control.scores() > limit).float().mean() * trainer.table.ceiling
                sums += torch.cat(
                    [compare_sums(before, after, ids, trainer.loaded), skipped.double().view(1) * ids.numel()]
                )
            tokens, predicted = held.numel(), held.shape[0] * (held.shape[1] - 1)
            nll_dense, nll_gated, agree, kl, skip = sums.tolist()
            rows.append(
                {
                    "share": skip / tokens,
                    "limit": limit,
                    "ppl_dense": math.exp(nll_dense / predicted),
                    "ppl_ratio": math.exp((nll_gated - nll_dense) / predicted),
                    "agreement": agree / predicted,
                    "kl": kl / predicted,
                }
            )
    return rows


def compare_sums(dense: Tensor, gated: Tensor, ids: Tensor, loaded: LoadedModel) -> Tensor:
    """Sums over predicted tokens: nll dense, nll gated, agreements, KL."""
    d, g, y = dense[:, :-1].flatten(0, 1), gated[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    sums = torch.zeros(4, dtype=torch.float64, device=ids.device)
    for rows in row_chunks(d.shape[0], loaded.decoder.vocab_size, 2**30):
        a, b = loaded.decoder.head(d[rows]).float(), loaded.decoder.head(g[rows]).float()
        sums[0] += torch.nn.functional.cross_entropy(a, y[rows], reduction="sum")
        sums[1] += torch.nn.functional.cross_entropy(b, y[rows], reduction="sum")
        sums[2] += (a.argmax(-1) == b.argmax(-1)).sum()
        sums[3] += kl_of_logits(a, b).sum()
    return sums
