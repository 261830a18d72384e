"""What `collect` left behind, checked and memory-mapped: the one way the later steps read it.

data = CollectedData.open(Path("sedac_data"), layers=None)
data.states[14][:8], data.labels[14][:8]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sedac_cli.artifacts.manifest import Manifest
from sedac_cli.artifacts.tensors import read_tensor
from sedac_cli.errors import InputError, UsageError


@dataclass(frozen=True)
class CollectedData:
    folder: Path
    manifest: Manifest
    layers: tuple[int, ...]
    states: dict[int, Tensor]
    labels: dict[int, Tensor]
    token_ids: Tensor
    sequence_ids: Tensor

    @property
    def tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def label_unit(self) -> str:
        return self.manifest.steps["collect"].summary["label_unit"]

    @property
    def target(self) -> str:
        return self.manifest.steps["collect"].settings["target"]

    def positions(self) -> Tensor:
        """Position of each token in its sequence, [tokens]."""
        starts = torch.ones_like(self.sequence_ids, dtype=torch.bool)
        starts[1:] = self.sequence_ids[1:] != self.sequence_ids[:-1]
        index = torch.arange(self.tokens)
        return index - torch.where(starts, index, 0).cummax(dim=0).values

    @classmethod
    def open(cls, folder: Path, layers: list[int] | None = None) -> CollectedData:
        """Read the manifest, check every file that is needed, map it. `layers=None` takes all that were collected."""
        from sedac_cli.pipeline.collect import hidden_name, label_name

        manifest = Manifest.read(folder)
        collected = manifest.step("collect", folder).settings["layers"]
        for layer in layers or []:
            if layer not in collected:
                raise UsageError(f"layer {layer} was not collected in {folder}: it holds {collected}")
        chosen = tuple(layers or collected)
        names = [hidden_name(x) for x in chosen] + [label_name(x) for x in chosen] + ["token_ids.pt", "sequence_ids.pt"]
        manifest.verify(folder, "collect", names)
        data = cls(
            folder=folder,
            manifest=manifest,
            layers=chosen,
            states={layer: read_tensor(folder / hidden_name(layer)) for layer in chosen},
            labels={layer: read_tensor(folder / label_name(layer)) for layer in chosen},
            token_ids=read_tensor(folder / "token_ids.pt"),
            sequence_ids=read_tensor(folder / "sequence_ids.pt"),
        )
        data._check_shapes()
        return data

    def _check_shapes(self) -> None:
        for layer in self.layers:
            rows = {"states": self.states[layer].shape[0], "labels": self.labels[layer].shape[0]}
            for what, count in rows.items():
                if count != self.tokens:
                    raise InputError(f"{self.folder}: layer {layer} has {count} {what} for {self.tokens} tokens")
