"""A Hugging Face checkpoint as the engine reads it, in whatever format its tensors are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from numpy.typing import NDArray

from gemma_convert.arrays.checksums import checksum_of
from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.errors import SourceError
from gemma_convert.stores.open_files import OpenFiles
from gemma_convert.stores.safetensors.header import StoredTensor
from gemma_convert.stores.safetensors.naming import Naming

if TYPE_CHECKING:
    from gemma_convert.mapping.plan import SourceTensor
    from gemma_convert.mapping.region import Ranges

PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header verbatim, its tensors in the order of their bytes."""

    file: str
    header: bytes
    """The first bytes of the file, length word included, up to the data."""
    tensors: tuple[StoredTensor, ...]
    size: int
    modified: int | str
    """Nanoseconds of a file here, the store's own tag of an object."""


class TensorFolder(ABC):
    """An open Hugging Face checkpoint. Use as a context manager.

    `tensors` is in the order of the files, under the names that the tables have; `naming` says what
    the files call them. `shards` are its safetensors files, or those that stand for others.
    """

    folder: Path
    shards: tuple[Shard, ...]
    naming: Naming
    tensors: Mapping[str, StoredTensor]
    beside: tuple[str, ...] = ()
    """What else the files hold, which is no parameter and is not read."""
    opened: Mapping[str, tuple[int, int | str]]
    """File → what its size and its time or tag were when it was opened."""
    _files: OpenFiles

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of all files."""
        self._files.close()

    @abstractmethod
    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from `offset` on.

        Raises SourceError where the file has become shorter or cannot be read.
        """

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    @property
    def own_files(self) -> list[str]:
        """The files that hold the tensors and what says where each of them lies."""
        return [*self.opened]

    def read_block(
        self, source: SourceTensor, ranges: Ranges, offset: int, data: NDArray[Any]
    ) -> None:
        """Fills `data` with a tensor's bytes from `offset` on: a block lies in one piece."""
        del ranges
        self.read_into(self.tensors[source.region.tensor], offset, data.data)

    def in_order(self, name: str) -> bool:
        """Every tensor is read in the order of its bytes."""
        return name in self.tensors

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces that are valid until the next one is asked for."""
        tensor = self.tensors[name]
        buffer = memoryview(bytearray(min(PIECE_BYTES, tensor.spec.nbytes)))
        for offset in range(0, tensor.spec.nbytes, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, tensor.spec.nbytes - offset)]
            self.read_into(tensor, offset, piece)
            yield piece

    def checksum(self, name: str) -> str:
        """xxh3_128 of a whole tensor."""
        return checksum_of(self.pieces(name))

    def check_unchanged(self) -> None:
        """Raises SourceError where a file is not what it was when it was opened."""
        for file, before in self.opened.items():
            now = self._files.now(file)
            if now != before:
                raise SourceError(
                    "The source changed while it was read.",
                    where=self.folder / file,
                    expected=f"{before[0]} bytes, untouched",
                    found=f"{now[0]} bytes",
                    do="leave the source alone until the conversion ends, then start again",
                )
