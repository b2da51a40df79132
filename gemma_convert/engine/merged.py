"""A Hugging Face checkpoint with an adapter merged into it, as the tensors of one checkpoint.

A merged value is weight + scaling · (B · A), computed in float64 and rounded once to the dtype of
the weight. Rows are taken in pieces that begin at fixed places, so that it does not depend on how
the tensor is cut into blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from gemma_convert.arrays.dtypes import CONVERTED, TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.engine.transfer import HuggingFaceTensors
from gemma_convert.errors import SourceError, some
from gemma_convert.mapping.plan import SourceTensor
from gemma_convert.mapping.region import Ranges
from gemma_convert.model.adapter import Adapter, refuse_beside_matrices
from gemma_convert.stores.tensor_folder import TensorFolder

_A, _B, _WEIGHT = ".lora_A.weight", ".lora_B.weight", ".weight"
_WHOLE_TEXT, _TEXT_ALONE = "model.language_model.", "model."


PIECE_VALUES = 1 << 20
"""Most values that are in memory in float64; a piece has one row at the least."""


class MergedTensors:
    """The tensors of `base`, with what the `matrices` of an adapter add to them.

    Raises SourceError where a matrix lacks its partner or the base model its weight, and where
    their shapes do not fit.
    """

    def __init__(self, base: HuggingFaceTensors, matrices: TensorFolder, adapter: Adapter) -> None:
        refuse_beside_matrices(matrices.specs, matrices.folder)
        self._base, self._matrices, self.adapter = base, matrices, adapter
        self._modules = _modules(base.specs, matrices.specs, adapter.rank, matrices.folder)
        self._matrices_of = lru_cache(1)(self._both)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._base.specs

    @property
    def merged(self) -> list[str]:
        """The names of the tensors that the adapter changes."""
        return list(self._modules)

    def read_block(self, source: SourceTensor, ranges: Ranges, offset: int, data: Array) -> None:
        """Fills `data` with a tensor's merged bytes from `offset` on."""
        self._base.read_block(source, ranges, offset, data)
        self._add(source.region.tensor, offset, data)

    def in_order(self, name: str) -> bool:
        """Every tensor is read in the order of its bytes."""
        return self._base.in_order(name)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces that are valid until the next one is asked for."""
        offset = 0
        for piece in self._base.pieces(name):
            self._add(name, offset, np.frombuffer(piece, np.uint8))
            offset += len(piece)
            yield piece

    def check_unchanged(self) -> None:
        """Raises SourceError where the model or the adapter has changed since it was opened."""
        self._base.check_unchanged()
        self._matrices.check_unchanged()

    def _add(self, name: str, offset: int, data: Array) -> None:
        """Adds to the bytes `data`, which begin at byte `offset` of a tensor [out in]."""
        if name not in self._modules:
            return
        spec = self.specs[name]
        values = data.view(numpy_dtype(spec.dtype))
        width, first = spec.shape[1], offset // spec.itemsize
        last, rows = first + values.size, max(1, PIECE_VALUES // spec.shape[1])
        a, b = self._matrices_of(name)
        for top in range(first // width // rows * rows, -(-last // width), rows):
            delta = (b[top : top + rows] @ a).reshape(-1)
            begin = top * width
            low, high = max(first, begin), min(last, begin + delta.size)
            part = values[low - first : high - first]
            changed = part.astype(np.float64)
            changed += self.adapter.scaling * delta[low - begin : high - begin]
            part[...] = changed.astype(part.dtype)

    def _both(self, name: str) -> tuple[Array, Array]:
        a, b = (self._whole(matrix) for matrix in self._modules[name])
        return a, b

    def _whole(self, name: str) -> Array:
        tensor = self._matrices.tensors[name]
        values = np.empty(tensor.spec.shape, numpy_dtype(tensor.spec.dtype))
        self._matrices.read_into(tensor, 0, values.reshape(-1).view(np.uint8).data)
        return values.astype(np.float64)


def _modules(
    base: Mapping[str, TensorSpec], matrices: Mapping[str, TensorSpec], rank: int, where: Path
) -> dict[str, tuple[str, str]]:
    """Weight of the base model → the names of its matrices A and B."""
    found: dict[str, tuple[str, str]] = {}
    for name, spec in matrices.items():
        if spec.dtype not in CONVERTED or len(spec.shape) != 2:
            raise SourceError(
                "A tensor of the adapter is no matrix of floating-point numbers.",
                where=f"{where}, tensor {name}",
                expected=f"{', '.join(CONVERTED)}, two dimensions",
                found=f"{spec.dtype} {list(spec.shape)}",
            )
    for name in matrices:
        module = name.removesuffix(_A).removesuffix(_B)
        a, b, weight = module + _A, module + _B, _weight(module, base)
        if a not in matrices or b not in matrices:
            raise SourceError(
                "A matrix of the adapter lacks its partner.",
                where=where,
                expected=f"{a} and {b}",
                found=name,
            )
        if weight is None:
            raise SourceError(
                "The adapter changes a weight that its base model does not have.",
                where=where,
                expected=some([one for one in base if one.endswith(_WEIGHT)], 3),
                found=module + _WEIGHT,
                do="name the model that the adapter was trained on with --base",
            )
        if found.get(weight, (a, b)) != (a, b):
            raise SourceError(
                "Two pairs of matrices change the same weight.",
                where=where,
                found=f"{found[weight][0]} and {a}",
                do="save the adapter again, from one model",
            )
        wanted = matrices[b].shape[0], matrices[a].shape[1]
        shapes = [(wanted[0], rank), (rank, wanted[1])]
        if [matrices[b].shape, matrices[a].shape] != shapes or base[weight].shape != wanted:
            raise SourceError(
                "The matrices of the adapter do not fit the weight that they change.",
                where=f"{where}, tensor {module}",
                expected=f"a weight of {list(base[weight].shape)}, and rank {rank}",
                found=f"A {list(matrices[a].shape)} and B {list(matrices[b].shape)}",
                do="name the model that the adapter was trained on with --base",
            )
        found[weight] = a, b
    return found


def _weight(module: str, base: Mapping[str, TensorSpec]) -> str | None:
    """The weight of a module, where the text model may be named as a whole or as a part."""
    names = (
        module,
        module.replace(_TEXT_ALONE, _WHOLE_TEXT, 1),
        module.replace(_WHOLE_TEXT, _TEXT_ALONE, 1),
    )
    return next((name + _WEIGHT for name in names if name + _WEIGHT in base), None)
