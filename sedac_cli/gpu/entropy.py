"""Entropy, confidence and argmax of logits in one read, and the V9 skip decision in the same launch.

Any vocabulary, float16, bfloat16 and float32, rows with any stride; rows are cut so that any number of them fills the chip.
Meaning and special values are those of the twins in reference.py: a logit of -inf has probability 0; a row with NaN or +inf,
or with nothing but -inf, has entropy NaN and never skips; with NaN its argmax is some index of the row.

    entropy, confidence, best = fused_entropy(logits)           # [N, V] or [B, T, V]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sedac_cli.gpu.compile import F32, I32, MAX_ROWS, counters, device_index, kind, launch, properties
from sedac_cli.gpu.reference import Decision, Entropy, by_chunk, row_chunks
from sedac_cli.gpu.tensors import Number, Rows, buffer, number

THREADS = 256
WARPS = THREADS // 32
QUEUE_FROM = 2**24
"""Logits from which warps take chunks of their own; below, a block per chunk, and one wave of blocks."""
MIN_CHUNK = 4096
ROUNDS = 16
"""Chunks a warp takes at most, looking for a number of chunks that ends with no warp idle."""
FULL = 0.93
"""Share of warps with work in the last round that is good enough."""

HEAD_BYTES = 256 * 2**20
"""Logits that `linear_entropy` has at a time, as float32. They are 441 rows of 151936: the head's weights are read once for each
chunk, and with few rows that reading would be what it costs."""


@dataclass(frozen=True)
class Form:
    """How a kernel reads: `group` warps share a chunk, `unroll` 16-byte loads of a thread at once, `blocks` per multiprocessor.

    A warp on its own reads through shared memory, where `stages` - 1 such rounds are under way while one is worked on.
    """

    group: int
    unroll: int
    blocks: int
    stages: int = 0

    @property
    def shared(self) -> int:
        """Bytes of a block."""
        return WARPS * self.stages * self.unroll * 512

    def resident(self, multiprocessors: int, shared: int) -> int:
        """Blocks that run at a time; each takes 1 KiB of a multiprocessor's shared memory for itself."""
        return multiprocessors * max(1, min(self.blocks, shared // (self.shared + 1024)))

    @property
    def constants(self) -> dict[str, int]:
        """What the source is compiled with beside its element types."""
        return {"GROUP": self.group, "UNROLL": self.unroll, "BLOCKS": self.blocks, "STAGES": self.stages}


# Both chosen by the times in benchmarks/results/gpu_entropy_forms.json (one H200), which has what lost as well.
FEW = Form(WARPS, 6, 4)
"""32 rows of 151936 logits over 528 blocks are 4.7 vectors a thread, all asked for at once: 7.8 us, 8.7 with four at once."""
MANY = Form(1, 4, 3, 3)
"""48 KiB a block and three blocks: 96 KiB under way per multiprocessor. 1024 rows take 77.3 us; with four stages 79.0, with four
blocks of three stages 83.6."""


@dataclass(frozen=True)
class Cut:
    """How rows are cut: `parts` chunks per row, each taken by `group` warps."""

    group: int
    parts: int
    chunk: int
    blocks: int
    queued: bool


def cut_of(rows: int, vocab: int, few: int, many: int, decision: bool = False) -> Cut:
    """Few logits: a block per chunk, and as many chunks as blocks fit the chip at once (`few`; with a decision one block of each
    row reads its hidden state). Many: a warp per chunk, `many` blocks of them.

    A chunk costs a reduction and finds its maximum anew, so the fewest rounds that leave no warp idle win: 1024 rows take 77 us in
    one round, 82 in two, 89 in four (gpu_entropy_forms.json).
    """
    if rows * vocab < QUEUE_FROM and rows <= few // 2:
        return cut(rows, vocab, FEW.group, min(few // rows - decision, -(-vocab // MIN_CHUNK)), few)
    warps = many * WARPS

    def full(rounds: int) -> float:
        return rows * (rounds * warps // rows) / (rounds * warps)

    enough = (rounds for rounds in range(1, ROUNDS + 1) if full(rounds) >= FULL)
    rounds = next(enough, max(range(1, ROUNDS + 1), key=full))
    parts = max(1, rounds * warps // rows)
    return cut(rows, vocab, MANY.group, min(parts, -(-vocab // MIN_CHUNK)), many)


def cut(rows: int, vocab: int, group: int, parts: int, resident: int) -> Cut:
    """About `parts` equal chunks, each starting on 128 bytes of its row."""
    chunk = -(-vocab // max(1, parts))
    chunk = -(-chunk // 64) * 64
    parts = -(-vocab // chunk)
    if group == FEW.group:
        return Cut(group, parts, chunk, rows * parts, False)
    blocks = min(resident, -(-rows * parts // WARPS))
    # Short rows are all alike, and there are many: dealing them costs less than asking for each.
    return Cut(group, parts, chunk, blocks, chunk >= MIN_CHUNK // 2 and rows * parts > blocks * WARPS)


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
    _launch(rows, [*result], {"T": kind(logits, "logits"), "DECISION": 0}, [])
    return _as_given(result, logits)


def linear_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], vocab: int) -> Entropy:
    """`fused_entropy` of `head(hidden)` for [N, H] rows; the logits of more than one chunk never exist at once."""
    rows = Rows.of(hidden, "hidden")
    least = HEAD_BYTES // (4 * MAX_ROWS)  # of shorter logits a chunk would be more rows than a launch takes
    return by_chunk(hidden, head, row_chunks(rows.count, max(vocab, least), HEAD_BYTES), fused_entropy)


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
    extra = [
        *now.args(), *before.args(), I32(now.width),
        *number(mean, "mean", device), *number(std, "std", device), *number(threshold, "threshold", device),
        F32(layer_progress), result.decision, result.load,
    ]  # fmt: skip
    constants = {"T": kind(logits, "logits"), "HT": kind(hidden, "hidden"), "DECISION": 1}
    _launch(rows, [result.entropy, result.confidence, None], constants, extra)
    return _as_given(result, logits)


def _launch(rows: Rows, outputs: list[Tensor | None], constants: dict[str, int], extra: list) -> None:
    if rows.count == 0:
        return
    if rows.count > MAX_ROWS:
        raise ValueError(f"{rows.count} rows in one call: at most {MAX_ROWS}")
    device = rows.tensor.device
    found = properties(device_index(device))
    count, shared = found.multi_processor_count, found.shared_memory_per_block_optin + 1024
    decision = bool(constants["DECISION"])
    how = cut_of(rows.count, rows.width, FEW.resident(count, shared), MANY.resident(count, shared), decision)
    form, apart = (FEW, decision) if how.group == FEW.group else (MANY, False)
    items = rows.count * how.parts
    partial = torch.empty(items, 4, dtype=torch.float32, device=device)
    norms = [torch.empty(rows.count if apart else items, 2, dtype=torch.float32, device=device)] if decision else []
    launch(
        "entropy", "entropy", constants | form.constants, device,
        grid=(how.blocks + rows.count * apart,), threads=THREADS, shared=form.shared, early=True,
        args=[
            *rows.args(), I32(rows.count), I32(rows.width), I32(how.parts), I32(how.chunk), partial, counters(device),
            I32(MAX_ROWS if how.queued else -1), *outputs, *norms, *extra,
        ],
    )  # fmt: skip


def _as_given(result, logits: Tensor):
    """[V] in, scalars out; more than three axes get their shape back."""
    shape = logits.shape[:-1]
    if result[0].shape == shape:
        return result
    return type(result)(*(tensor.view(shape) for tensor in result))
