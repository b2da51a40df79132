"""Folders of torch's distributed checkpoint, written by torch in one process."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType

Parts = Callable[[torch.Size], list[tuple[list[int], list[int]]]]
"""Shape of a tensor → offsets and sizes of the chunks that it is saved in."""


def state_of(source: Path) -> dict[str, torch.Tensor]:
    """Name → tensor of a safetensors checkpoint."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        found |= load_file(file)
    return found


def halves(axis: int) -> Parts:
    """Two chunks, the first one smaller, where the axis is there and long enough."""

    def parts(shape: torch.Size) -> list[tuple[list[int], list[int]]]:
        whole = [0] * len(shape), list(shape)
        if len(shape) <= axis or shape[axis] < 2:
            return [whole]
        cut = shape[axis] // 3 or 1
        first, second, sizes = [*shape], [0] * len(shape), [*shape]
        first[axis], second[axis], sizes[axis] = cut, cut, shape[axis] - cut
        return [(whole[0], first), (second, sizes)]

    return parts


def quarters(shape: torch.Size) -> list[tuple[list[int], list[int]]]:
    """The chunks of a grid over the first two axes."""
    rows = halves(0)(shape)
    if len(shape) < 2 or shape[1] < 2:
        return rows
    columns = halves(1)(shape)
    return [
        ([low[0], left[1], *low[2:]], [high[0], right[1], *high[2:]])
        for low, high in rows
        for left, right in columns
    ]


def with_empty(shape: torch.Size) -> list[tuple[list[int], list[int]]]:
    """Halves, and a chunk of nothing behind them, as the last of too many processes has it."""
    if not len(shape) or shape[0] < 2:
        return halves(0)(shape)
    end = [shape[0], *[0] * (len(shape) - 1)], [0, *shape[1:]]
    return [*halves(0)(shape), end]


class Sharding(dcp.DefaultSavePlanner):
    """Plans several chunks for each tensor, as several processes would."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._parts = parts

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            if item.tensor_data is None:
                items.append(item)
                continue
            for number, (offsets, sizes) in enumerate(self._parts(item.tensor_data.size)):
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                index = MetadataIndex(item.index.fqn, chunk.offsets, number)
                data = replace(item.tensor_data, chunk=chunk)
                items.append(replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        if index.offset is None or not isinstance(found, torch.Tensor):
            return found
        parts = {tuple(offsets): sizes for offsets, sizes in self._parts(found.shape)}
        sizes = parts[tuple(index.offset)]
        where = tuple(slice(o, o + s) for o, s in zip(index.offset, sizes, strict=True))
        return found[where].clone()


def save_distcp(
    folder: Path, state: dict[str, Any], parts: Parts | None = None, *, one_file: bool = True
) -> Path:
    """Saves a state, each tensor in the chunks that `parts` says; gives the folder."""
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=one_file, sync_files=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = None if parts is None else Sharding(parts)
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    return folder


def copy_others(source: Path, target: Path) -> None:
    """Copies what is no weights of a Hugging Face checkpoint."""
    for file in source.iterdir():
        if ".safetensors" not in file.name:
            shutil.copy(file, target)
