"""Run a model over text and keep, for every token, the hidden state entering the checkpoint layers and a label.

One forward pass serves all layers; logits exist only a chunk at a time; memory does not grow with the number of samples.
Killed at any moment, the run resumes and ends in the same bytes.

    report = collect(CollectOptions(layers=(7, 14, 21)), ModelSpec(), TextSpec(samples=40))
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedac_cli.artifacts.files import (
    folder_lock,
    make_folder,
    read_json,
    remove_stale_parts,
    sync_folder,
    write_json,
)
from sedac_cli.artifacts.manifest import MANIFEST, Manifest, make_step
from sedac_cli.artifacts.tensors import write_tensor
from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.corpus import Corpus, pad_batch
from sedac_cli.errors import InputError, UsageError
from sedac_cli.models import LoadedModel, load_model
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.labels import UNITS, Target, label_batch
from sedac_cli.pipeline.spool import Batch, Spool, all_batches, read_rows
from sedac_cli.pipeline.world import World

log = logging.getLogger("sedac")

PARTIAL = ".partial"
MAX_BAD_SHARE = 0.01
TOKEN_FILES = ("token_ids.pt", "sequence_ids.pt")


@dataclass(frozen=True)
class CollectOptions:
    layers: tuple[int, ...] = (7, 14, 21)
    save_dir: Path = Path("sedac_data")
    target: Target = "final"
    batch_size: int = 8
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class CollectReport:
    save_dir: Path
    files: dict[str, str]
    tokens: int
    sequences: int
    set_aside: int
    label_unit: str
    label_mean: dict[int, float]
    seconds: float
    tokens_per_second: float


def hidden_name(layer: int | str) -> str:
    return f"hidden_states_layer{layer}.pt"


def label_name(layer: int | str) -> str:
    return f"entropies_layer{layer}.pt"


def collect(
    options: CollectOptions, model: ModelSpec, text: TextSpec, progress: Progress = quiet_progress
) -> CollectReport:
    world = World.join()
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite contradict each other")
    if world.main:
        make_folder(options.save_dir)
    with world.only_main(lambda: folder_lock(options.save_dir)):
        if world.main:
            _refuse_finished(options)
        loaded = load_model(world.place(model))
        run = _Collection(options, text, loaded, world, progress)
        if world.main:
            run.open_partial()
        world.wait()
        with _explained(options.save_dir):
            run.work()
            world.wait()
            report = run.finish() if world.main else None
        world.wait()
    return report or run.describe_worker()


@contextlib.contextmanager
def _explained(save_dir: Path) -> Iterator[None]:
    """A disk that takes no more bytes in the middle of a run: say where, and that nothing committed is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        raise InputError(
            f"cannot write to {save_dir}: {error.strerror}",
            hint="make room there, then the same command with --resume",
        ) from error


def _refuse_finished(options: CollectOptions) -> None:
    manifest = options.save_dir / MANIFEST
    if manifest.exists() and not (options.overwrite or options.resume):
        raise InputError(
            f"{options.save_dir} already holds a finished collection",
            hint="--overwrite to replace it, or --save-dir elsewhere",
        )
    if (options.save_dir / PARTIAL / "run.json").exists() and not (options.overwrite or options.resume):
        raise InputError(
            f"{options.save_dir} holds an unfinished collection",
            hint="--resume to continue it, or --overwrite to start again",
        )


def collect_settings(options: CollectOptions, text: TextSpec) -> dict[str, Any]:
    """What must be the same for a resumed run to give the same files."""
    return {
        "layers": list(options.layers),
        "target": options.target,
        "batch_size": options.batch_size,
        "text": asdict(text),
    }


class _Collection:
    def __init__(self, options: CollectOptions, text: TextSpec, loaded: LoadedModel, world: World, progress: Progress):
        self.options, self.text, self.loaded, self.world = options, text, loaded, world
        self.progress = progress
        self.decoder = loaded.decoder
        self.partial = options.save_dir / PARTIAL
        self.began = time.monotonic()
        for layer in options.layers:
            if not 0 <= layer < self.decoder.num_layers:
                raise UsageError(
                    f"--layers: layer {layer} does not exist, {loaded.identity.ref} has layers "
                    f"0..{self.decoder.num_layers - 1}"
                )
        self.decoder.check_head()
        self.dtype = loaded.model.dtype
        # The final entropy is one number per token for all layers: one raw file serves them.
        self.label_columns = {
            layer: "label" if options.target == "final" else f"label{layer}" for layer in options.layers
        }
        width = self.decoder.hidden_size * self.dtype.itemsize
        self.row_bytes = {f"hidden{layer}": width for layer in options.layers}
        self.row_bytes |= dict.fromkeys(self.label_columns.values(), 4) | {"ids": 4, "sequence": 4}

    # Before ---------------------------------------------------------------------------------------------------

    def open_partial(self) -> None:
        """Start anew, or make sure that what is there was begun with the same settings and model."""
        options = self.options
        remove_stale_parts(options.save_dir)
        if options.overwrite:
            shutil.rmtree(self.partial, ignore_errors=True)
            (options.save_dir / MANIFEST).unlink(missing_ok=True)
            for pattern in (hidden_name("*"), label_name("*"), *TOKEN_FILES):
                for path in options.save_dir.glob(pattern):
                    path.unlink()
        run = {"settings": collect_settings(self.options, self.text), "model": self.loaded.identity.model_dump()}
        started = self.partial / "run.json"
        manifest = options.save_dir / MANIFEST
        if options.resume and manifest.exists():
            finished = Manifest.read(options.save_dir)
            self._require_same(
                {"settings": finished.step("collect", options.save_dir).settings, "model": finished.model.model_dump()},
                run,
            )
            raise InputError(
                f"{options.save_dir} is complete: there is nothing to resume", hint="sedac train-probes comes next"
            )
        if options.resume and started.exists():
            self._require_same(read_json(started), run)
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()
        write_json(started, run)

    def _require_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        old, new = _flatten(before), _flatten(now)
        changed = [
            f"{key}: was {old.get(key)}, now {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise InputError(
                "cannot resume with other settings:\n  " + "\n  ".join(changed[:10]),
                hint="the same options as before, or --overwrite to start again",
            )

    # The work -------------------------------------------------------------------------------------------------

    def work(self) -> None:
        done = {batch.index: batch for batch in all_batches(self.partial)}
        spool = Spool(self.partial, self.world.rank, self.row_bytes)
        show = self.progress if self.world.main else quiet_progress
        bar = show(total=self.text.samples, desc="collect", unit="sample")
        bad = sum(len(batch.info["bad"]) for batch in done.values())
        tokens, began = 0, time.monotonic()
        first = 0
        try:
            for index, samples in enumerate(Corpus(self.text, self.loaded.tokenizer).batches(self.options.batch_size)):
                text = zlib.crc32(repr(samples).encode())
                if index in done and done[index].info["text"] != text:
                    raise InputError(
                        f"cannot resume: the text of {self.text.dataset} has changed since the run was begun",
                        hint="--overwrite to start again",
                    )
                if index not in done and index % self.world.size == self.world.rank:
                    rows, data, wrong = self.run_batch(samples, first)
                    info = {"sequences": len(samples), "first": first, "bad": wrong, "text": text}
                    spool.add(index, rows, data, info)
                    bad += len(wrong)
                    tokens += rows
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tok/s", refresh=False)
                    self._check_bad(bad, self.text.samples)
                bar.update(len(samples))
                first += len(samples)
            spool.commit()
        except KeyboardInterrupt:
            spool.commit()
            raise
        finally:
            bar.close()
            spool.close()

    def _check_bad(self, bad: int, of: int) -> None:
        if bad > MAX_BAD_SHARE * of:
            raise InputError(
                f"{bad} of {of} samples gave NaN or infinite hidden states, more than {MAX_BAD_SHARE:.0%}",
                hint="try --dtype float32 or bfloat16; the model may overflow in this precision",
            )

    @torch.inference_mode()
    def run_batch(self, samples: list[list[int]], first: int) -> tuple[int, dict[str, memoryview], list[int]]:
        """(rows, raw bytes by column, sample numbers set aside) for one batch."""
        ids, mask = pad_batch(samples, self.loaded.tokenizer.pad_token_id or 0)
        ids, mask = ids.to(self.decoder.device), mask.to(self.decoder.device)
        states: dict[int, Tensor] = {}
        handles = [
            self.decoder.at_checkpoint(layer, partial(states.__setitem__, layer)) for layer in self.options.layers
        ]
        try:
            given = None if bool(mask.all()) else mask
            last = self.decoder.last_hidden(ids, given)
        finally:
            for handle in handles:
                handle.remove()
        labels = label_batch(self.options.target, self.decoder, ids, given, states, last)
        keep = mask.bool()
        wrong = [first + row for row in self._not_finite(states, labels, keep)]
        for number in wrong:
            keep[number - first] = False
        if wrong:
            log.warning("set aside: NaN or infinite values in sample %s", ", ".join(map(str, wrong)))
        sequence = torch.arange(first, first + len(samples), device=ids.device).unsqueeze(1).expand_as(ids)
        data = {
            f"hidden{layer}": _raw(states[layer].to(keep.device)[keep], self.dtype) for layer in self.options.layers
        }
        data |= {
            column: _raw(labels[layer].to(keep.device)[keep], torch.float32)
            for layer, column in self.label_columns.items()
        }
        data["ids"] = _raw(ids[keep], torch.int32)
        data["sequence"] = _raw(sequence[keep], torch.int32)
        return int(keep.sum()), data, wrong

    def _not_finite(self, states: dict[int, Tensor], labels: dict[int, Tensor], keep: Tensor) -> list[int]:
        """Rows of the batch with a NaN or an infinity: such a value makes a sum not finite, so one sum per row tells."""
        total = torch.zeros(keep.shape[0], dtype=torch.float64, device=keep.device)
        for value in (*(s.float().sum(-1) for s in states.values()), *labels.values()):
            total += torch.where(keep, value.to(keep.device).double(), 0.0).sum(dim=1)
        return torch.nonzero(~torch.isfinite(total)).flatten().tolist()

    # After ----------------------------------------------------------------------------------------------------

    def finish(self) -> CollectReport:
        """Merge, write the files, and last the manifest that makes them count."""
        batches = all_batches(self.partial)
        sequences = sum(batch.info["sequences"] for batch in batches)
        bad = [number for batch in batches for number in batch.info["bad"]]
        self._check_bad(len(bad), sequences)
        rows = sum(batch.rows for batch in batches)
        if rows == 0:
            raise InputError("no token was collected")
        files: dict[str, str] = {}
        for layer in self.options.layers:
            shape = (rows, self.decoder.hidden_size)
            files[hidden_name(layer)] = self._merge(batches, hidden_name(layer), f"hidden{layer}", shape, self.dtype)
            files[label_name(layer)] = self._merge(
                batches, label_name(layer), self.label_columns[layer], (rows,), torch.float32
            )
        for name, column in zip(TOKEN_FILES, ("ids", "sequence"), strict=True):
            files[name] = self._merge(batches, name, column, (rows,), torch.int32)
        for name in files:  # all of them whole: only now does anything become visible
            os.replace(self.partial / name, self.options.save_dir / name)
        sync_folder(self.options.save_dir)
        seconds = time.monotonic() - self.began
        means = {layer: self._mean(batches, column) for layer, column in self.label_columns.items()}
        report = CollectReport(
            self.options.save_dir, files, rows, sequences - len(bad), len(bad), UNITS[self.options.target], means,
            seconds, rows / seconds,
        )  # fmt: skip
        summary = {
            "tokens": rows,
            "sequences": report.sequences,
            "set_aside": bad,
            "label_unit": report.label_unit,
            "label_mean": {str(layer): mean for layer, mean in means.items()},
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        step = make_step(collect_settings(self.options, self.text), files, summary)
        Manifest(model=self.loaded.identity, steps={"collect": step}).write(self.options.save_dir)
        shutil.rmtree(self.partial)
        return report

    def _merge(self, batches: list[Batch], name: str, column: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        chunks = read_rows(self.partial, batches, column, self.row_bytes[column])
        return write_tensor(self.partial / name, shape, dtype, chunks)

    def _mean(self, batches: list[Batch], column: str) -> float:
        total, count = 0.0, 0
        for chunk in read_rows(self.partial, batches, column, 4):
            values = torch.frombuffer(bytearray(chunk), dtype=torch.float32).double()
            total, count = total + values.sum().item(), count + values.numel()
        return total / count if count else math.nan

    def describe_worker(self) -> CollectReport:
        """What a process other than the first returns: the merged files are the first one's to report."""
        return CollectReport(self.options.save_dir, {}, 0, 0, 0, UNITS[self.options.target], {}, 0.0, 0.0)


def _raw(values: Tensor, dtype: torch.dtype) -> memoryview:
    bytes_: Any = values.to("cpu", dtype).contiguous().view(torch.uint8).numpy()
    return memoryview(bytes_).cast("B")


def _flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat
