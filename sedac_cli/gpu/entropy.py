"""Entropy, confidence and argmax of logits in one read, and the V9 skip decision in the same launch.

Any vocabulary, float16, bfloat16 and float32, rows with any stride; a vocabulary is cut over as many blocks as fill the chip,
so one row is as quick as it can be. Meaning and special values are those of the twins in reference.py: a logit of -inf has
probability 0; a row with NaN or +inf, or with nothing but -inf, has entropy NaN and never skips; with NaN its argmax is some
index of the row.

    entropy, confidence, best = fused_entropy(logits)           # [N, V] or [B, T, V]
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedac_cli.gpu.compile import F32, I32, I64, MAX_ROWS, counters, device_index, kind, launch, properties
from sedac_cli.gpu.reference import Decision, Entropy
from sedac_cli.gpu.tensors import Number, Rows, buffer, number

THREADS = 256
BLOCKS = 4
"""Blocks per multiprocessor the kernel is compiled for: 64 registers a thread, no spills."""
UNROLL = 4
"""16-byte loads in flight per thread: 64 KiB per multiprocessor, over the ~40 KiB that cover HBM's latency."""
MIN_SPAN = 2048
ROW_PER_BLOCK = 2048
"""From this many rows on there are enough whole rows to fill the chip evenly; no row is cut."""


def span_of(rows: int, vocab: int, multiprocessors: int) -> int:
    """Logits per block: one wave of blocks while rows are few; then up to eight, because multiprocessors are not all equally
    far from memory and a static share leaves the near ones idle at the end."""
    if rows >= ROW_PER_BLOCK:
        return vocab * max(1, 8192 // vocab)
    wave = -(-rows * vocab // (multiprocessors * BLOCKS))
    waves = min(8, max(1, wave // 16384))
    span = max(MIN_SPAN, -(-wave // waves))
    return -(-span // 1024) * 1024


def fused_entropy(logits: Tensor, out: Entropy | None = None) -> Entropy:
    """Entropy (bits, float32), largest probability (float32) and argmax (int64) of every row."""
    rows = Rows.of(logits, "logits")
    device = rows.tensor.device
    entropy, confidence, best = out or (None, None, None)
    result = Entropy(
        buffer(entropy, "entropy", rows.shape, torch.float32, device),
        buffer(confidence, "confidence", rows.shape, torch.float32, device),
        buffer(best, "argmax", rows.shape, torch.int64, device),
    )
    _launch(rows, [*result], {"T": kind(logits, "logits"), "DECISION": 0}, [], 0)
    return _as_given(result, logits)


def fused_entropy_decision(
    logits: Tensor,
    hidden: Tensor,
    prev_hidden: Tensor,
    mean: Number,
    std: Number,
    layer_progress: float,
    threshold: Number,
    out: Decision | None = None,
) -> Decision:
    """Entropy in bits, confidence sigmoid(2 (mean - H) / std), decision (True: skip) and load, one row per token.

    stability = 1 / (1 + |h - prev| / |h|); skip iff confidence * stability * p > threshold - 0.2 p;
    load = 0.5 (1 - confidence) + 0.3 (1 - stability) + 0.2 (1 - p). mean, std and threshold may live on the device.
    """
    rows, now, before = Rows.of(logits, "logits"), Rows.of(hidden, "hidden"), Rows.of(prev_hidden, "prev_hidden")
    device = rows.tensor.device
    if hidden.shape != prev_hidden.shape or hidden.dtype != prev_hidden.dtype or now.shape != rows.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, hidden {tuple(hidden.shape)} {hidden.dtype} and prev_hidden "
            f"{tuple(prev_hidden.shape)} {prev_hidden.dtype}: one hidden state of each per row of logits"
        )
    if now.tensor.device != device or before.tensor.device != device:
        raise ValueError(f"logits are on {device}, hidden states on {hidden.device} and {prev_hidden.device}")
    entropy, confidence, decision, load = out or (None, None, None, None)
    result = Decision(
        buffer(entropy, "entropy", rows.shape, torch.float32, device),
        buffer(confidence, "confidence", rows.shape, torch.float32, device),
        buffer(decision, "decision", rows.shape, torch.bool, device),
        buffer(load, "load", rows.shape, torch.float32, device),
    )
    norms = torch.empty(max(1, rows.count), 2, dtype=torch.float32, device=device)
    extra = [
        norms, *now.args(), *before.args(), I32(now.width),
        *number(mean, "mean", device), *number(std, "std", device), *number(threshold, "threshold", device),
        F32(layer_progress), result.decision, result.load,
    ]  # fmt: skip
    constants = {"T": kind(logits, "logits"), "HT": kind(hidden, "hidden"), "DECISION": 1}
    _launch(rows, [result.entropy, result.confidence, None], constants, extra, rows.count)
    return _as_given(result, logits)


def _launch(rows: Rows, outputs: list[Tensor | None], constants: dict[str, int], extra: list, norm_blocks: int) -> None:
    if rows.count == 0:
        return
    if rows.count > MAX_ROWS:
        raise ValueError(f"{rows.count} rows in one call: at most {MAX_ROWS}")
    device = rows.tensor.device
    span = span_of(rows.count, rows.width, properties(device_index(device)).multi_processor_count)
    blocks = -(-rows.count * rows.width // span)
    partial = torch.empty(blocks + rows.count, 4, dtype=torch.float32, device=device)
    launch(
        "entropy", "entropy", constants | {"UNROLL": UNROLL, "BLOCKS": BLOCKS}, device,
        grid=(norm_blocks + blocks,), threads=THREADS,
        args=[*rows.args(), I32(rows.count), I32(rows.width), I64(span), partial, counters(device), *outputs, *extra],
    )  # fmt: skip


def _as_given(result, logits: Tensor):
    """[V] in, scalars out; more than three axes get their shape back."""
    shape = logits.shape[:-1]
    if result[0].shape == shape:
        return result
    return type(result)(*(tensor.view(shape) for tensor in result))
