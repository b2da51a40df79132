"""Wild values: every tensor has sizes from 0.5 to 2, norms too, of either sign.

With layer scalars from 0.81 to 0.94 each layer forgets a part of what was before and writes as
much, and attention is as good as a choice of one token: such a network amplifies rounding a
thousand times or more (`tests/test_weights.py`). It is the hard case of a logit check. Every value
is one of bfloat16.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from gemma_convert.tiny.trained import Float32
from gemma_convert.tiny.weights import seeded


def wild_values(name: str, seed: int, count: int) -> Float32:
    """The first `count` values of a tensor [count], determined by seed and name."""
    bits = seeded(name, seed).integers(0, 1 << 16, count, np.uint16)
    sizes = (bits & 0x1F) + 0x3F50 if name.endswith("layer_scalar") else (bits & 0xFF) + 0x3F00
    values: Float32 = (sizes | (bits & 0x8000)).view(ml_dtypes.bfloat16).astype(np.float32)
    return values
