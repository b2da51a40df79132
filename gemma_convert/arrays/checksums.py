"""The checksum of regions: fast enough that it costs less than the copy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash

from gemma_convert.arrays.values import Array


def checksum_of(pieces: Iterable[memoryview]) -> str:
    """xxh3_128 of bytes that come in pieces."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def checksum(values: Array) -> str:
    """xxh3_128 of the values' bytes in C order."""
    return xxhash.xxh3_128(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest()
