"""The kinds of made-up weights, and tensors of any size of them.

A tensor is a block of values of its own, repeated. The block's length is prime, so that no two
rows, heads or experts begin at the same place of it, and none are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Literal

import numpy as np

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.tiny.trained import trained_values
from gemma_convert.tiny.weights import Array, Shape, random_weights
from gemma_convert.tiny.wild import wild_values

Repeated = Literal["trained", "wild"]
Weights = Literal["random", "trained", "wild"]
"""`random` ones show a mistake in a tiny model best, `trained` ones have statistics like a trained
model's, and `wild` ones amplify rounding."""

BLOCK = (1 << 21) - 9
"""Values in a block, 4 MiB of bfloat16."""


def weights_of(
    kind: Weights, shapes: Mapping[str, Shape], seed: int, dtype: str
) -> dict[str, Array]:
    """One array of `dtype` per name in `shapes` [its shape], determined by seed and name."""
    if kind == "random":
        return random_weights(shapes, seed, dtype)
    return {
        name: np.resize(_block(kind, name, TensorSpec(dtype, shape), seed), shape)
        for name, shape in shapes.items()
    }


def tensor_bytes(kind: Repeated, name: str, spec: TensorSpec, seed: int) -> Iterator[memoryview]:
    """The bytes of one tensor of any size, in pieces of at most one block."""
    block = _block(kind, name, spec, seed).view(np.uint8).data
    whole, rest = divmod(spec.nbytes, len(block) or 1)
    for _ in range(whole):
        yield block
    yield block[:rest]


def _block(kind: Repeated, name: str, spec: TensorSpec, seed: int) -> Array:
    count = min(prod(spec.shape), BLOCK)
    values = (
        trained_values(name, spec.shape, seed, count)
        if kind == "trained"
        else wild_values(name, seed, count)
    )
    block: Array = values.astype(numpy_dtype(spec.dtype))
    return block
