"""Reads a folder of torch's distributed checkpoint as a Hugging Face checkpoint, by region.

Its tensors have Hugging Face names, perhaps below what a training state calls its model. Nothing is
unpickled: `.metadata` and what stands before each tensor are read as plain data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path

from gemma_convert.errors import SourceError, some
from gemma_convert.files.unfinished import refuse_unfinished
from gemma_convert.model.huggingface_files import SINGLE
from gemma_convert.stores.distcp.chunk_file import values_start
from gemma_convert.stores.distcp.metadata import FILE, Chunk, ListedTensor, Listing, read_metadata
from gemma_convert.stores.open_files import OpenFiles
from gemma_convert.stores.safetensors.header import (
    StoredTensor,
    library_order,
    parse_header,
    safetensors_header,
)
from gemma_convert.stores.safetensors.naming import find_naming
from gemma_convert.stores.tensor_folder import Shard, TensorFolder

_EMBEDDING = re.compile(
    r"(?P<above>.*?)(model\.language_model\.|language_model\.model\.|language_model\.|model\.)?"
    r"embed_tokens\.weight"
)
"""By it the model is found in a training state, under any of the names that are read."""


class DistcpFolder(TensorFolder):
    """An open folder of torch's distributed checkpoint.

    `shards` is the one safetensors file that its tensors would be, under the names that the tables
    have.
    """

    def __init__(self, folder: Path) -> None:
        refuse_unfinished(folder)
        self.folder = folder
        self._files = OpenFiles(folder)
        listing = read_metadata(folder)
        model = _model(listing.tensors, folder)
        self.beside = _beside(listing, model)
        named = find_naming(model, folder).stored
        self._listed = {name: listing.tensors[model[own]] for name, own in named.items()}
        self.naming = find_naming(named, folder)
        try:
            chunks = [chunk for one in self._listed.values() for chunk in one.chunks]
            names = [FILE, *sorted({chunk.file for chunk in chunks})]
            self.opened = {file: self._files.open(file) for file in names}
            self._check_places(chunks)
            self.shards = (self._shard(),)
        except BaseException:
            self.close()
            raise
        tensors = {tensor.name: tensor for tensor in self.shards[0].tensors}
        order = sorted(tensors, key=lambda name: _place(self._listed[name]))
        self.tensors = {name: tensors[name] for name in order}
        self._start = lru_cache(1 << 16)(self._values_start)

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        listed = self._listed[tensor.name]
        size = tensor.spec.itemsize
        first, skipped = divmod(offset, size)
        if skipped or len(buffer) % size:
            raise ValueError("a tensor is read by whole values")
        last = first + len(buffer) // size
        for number, chunk in enumerate(listed.chunks):
            for place, within, count in _runs(tensor.spec.shape, chunk, first, last):
                start = self._start(tensor.name, number) + within * size
                part = buffer[(place - first) * size : (place - first + count) * size]
                self._files.read_into(chunk.file, start, part, f"tensor {tensor.name}")

    def _values_start(self, name: str, number: int) -> int:
        listed = self._listed[name]
        return values_start(self._files, listed.chunks[number], listed.spec, name)

    def _shard(self) -> Shard:
        """The file of safetensors that the tensors would be, as the library orders them."""
        specs = library_order({name: one.spec for name, one in self._listed.items()})
        header = safetensors_header(specs)
        size = len(header) + sum(spec.nbytes for spec in specs.values())
        tensors = parse_header(header, size, SINGLE, self.folder / FILE)
        return Shard(SINGLE, header, tensors, size, self.opened[FILE][1])

    def _check_places(self, chunks: list[Chunk]) -> None:
        """Raises SourceError for chunks beyond the end of their file."""
        for chunk in chunks:
            size = self.opened[chunk.file][0]
            if chunk.start + chunk.length > size:
                raise SourceError(
                    "A file of the checkpoint is truncated: a chunk lies beyond its end.",
                    where=self.folder / chunk.file,
                    expected=f"{chunk.start + chunk.length} bytes",
                    found=f"{size} bytes",
                    do="copy the checkpoint again",
                )


def _model(tensors: Mapping[str, ListedTensor], folder: Path) -> dict[str, str]:
    """Name in the model's own state → flat name, of the tensors of the one model that is there.

    All tensors where none is known as a Gemma's embedding. Raises SourceError for several models.
    """
    above = {
        (one.path[:-1], match["above"])
        for one in tensors.values()
        if (match := _EMBEDDING.fullmatch(one.path[-1]))
    }
    if not above:
        return {name: name for name in tensors}
    if len(above) > 1:
        raise SourceError(
            "The checkpoint holds several models.",
            where=folder / FILE,
            expected="one",
            found=some(sorted(".".join((*keys, head)).strip(".") for keys, head in above)),
            do="save the state of one of them as a checkpoint of its own",
        )
    ((keys, head),) = above
    found: dict[str, str] = {}
    for name, one in tensors.items():
        if one.path[:-1] == keys and one.path[-1].startswith(head):
            own = one.path[-1].removeprefix(head)
            if own in found:
                raise SourceError(
                    "Two tensors of the checkpoint stand for one.",
                    where=folder / FILE,
                    found=f"{found[own]} and {name}",
                )
            found[own] = name
    return found


def _beside(listing: Listing, model: Mapping[str, str]) -> tuple[str, ...]:
    """What a state holds beside its model, by the first of its keys."""
    used = set(model.values())
    counts = Counter(
        one.path[0] for name, one in listing.tensors.items() if name not in used
    ) + Counter(name.partition(".")[0] for name in listing.others)
    words = {1: "1 entry"}
    return tuple(
        f"{key} ({words.get(count, f'{count} entries')} of the state)"
        for key, count in sorted(counts.items())
    )


def _place(listed: ListedTensor) -> tuple[str, int]:
    """Where a tensor begins, so that files are read from their beginning to their end."""
    return min(((chunk.file, chunk.start) for chunk in listed.chunks), default=("", 0))


def _runs(
    shape: tuple[int, ...], chunk: Chunk, first: int, last: int
) -> Iterator[tuple[int, int, int]]:
    """(element of the tensor, element of the chunk, count) of what a chunk has of [first, last).

    Elements are counted in the order of the shape. A run is what is contiguous in both.
    """
    if not prod(chunk.sizes):
        return
    axis = next((a for a in reversed(range(len(shape))) if chunk.sizes[a] != shape[a]), 0)
    inner = prod(shape[axis + 1 :])
    period = prod(shape[axis:])
    count = prod(chunk.sizes[axis:])
    begin = chunk.offsets[axis] * inner if shape else 0
    for outer in range(first // period, -(-last // period)):
        within = _flat(outer, shape[:axis], chunk)
        if within is None:
            continue
        place = outer * period + begin
        low, high = max(place, first), min(place + count, last)
        if low < high:
            yield low, within * count + low - place, high - low


def _flat(outer: int, shape: tuple[int, ...], chunk: Chunk) -> int | None:
    """The number of a place on the outer axes among those of a chunk; None where it has it not."""
    flat, step = 0, 1
    for axis in reversed(range(len(shape))):
        outer, place = divmod(outer, shape[axis])
        place -= chunk.offsets[axis]
        if not 0 <= place < chunk.sizes[axis]:
            return None
        flat += place * step
        step *= chunk.sizes[axis]
    return flat
