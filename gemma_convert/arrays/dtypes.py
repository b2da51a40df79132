"""Dtypes of tensors, and the policy that says in which dtype a target is stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

import ml_dtypes
import numpy as np

from gemma_convert.errors import SourceError

Choice = Literal["keep", "float32", "bfloat16"]
ScaledChoice = Literal["float32", "bfloat16"]

SAFETENSORS_NAMES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
}
"""safetensors' spelling → numpy's (with ml_dtypes)."""

SAFETENSORS_SPELLINGS = {numpy: stored for stored, numpy in SAFETENSORS_NAMES.items()}
"""numpy's name → safetensors' spelling."""

CONVERTED = ("bfloat16", "float16", "float32")
"""Dtypes that weights may have."""

_EXACT = {
    ("bfloat16", "float32"),
    ("float16", "float32"),
}


@cache
def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The numpy dtype of a name, little-endian."""
    extension = getattr(ml_dtypes, name, None)
    dtype: np.dtype[np.generic] = np.dtype(name if extension is None else extension)
    return dtype


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (numpy's name) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return numpy_dtype(self.dtype).itemsize

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize


def exact(source: str, target: str) -> bool:
    """Whether every value of `source` has its place in `target`."""
    return source == target or (source, target) in _EXACT


def rounds(source: str, target: str, *, scaled: bool) -> bool:
    """Whether storing `source` as `target` rounds by its nature: to bfloat16, from more digits."""
    return target == "bfloat16" and (scaled or source != "bfloat16")


def widest(left: str, right: str) -> str:
    """The dtype that holds every value of both; two dtypes that are not alike meet in float32."""
    return left if left == right else "float32"


@dataclass(frozen=True)
class DTypePolicy:
    """In which dtype targets are stored: `scaled` is for rows that are multiplied by a root."""

    dtype: Choice = "keep"
    scaled: ScaledChoice = "float32"

    def target(self, source: str, *, scaled: bool, where: str) -> str:
        """The dtype of a target whose source, the tensor `where`, has dtype `source`.

        Raises SourceError for a dtype that weights do not have.
        """
        if source not in CONVERTED:
            raise SourceError(
                "A weight has a dtype that gemma-convert does not convert.",
                where=f"tensor {where}",
                expected=", ".join(CONVERTED),
                found=source,
                do="convert the original bfloat16 checkpoint",
            )
        if scaled:
            return self.scaled
        return source if self.dtype == "keep" else self.dtype
