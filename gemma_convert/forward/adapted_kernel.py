"""A kernel with an adapter: two products, of which nothing is merged.

x · W + scaling · (x · A) · B, over the axes that the framework has them, as fine-tuning libraries
for JAX compute it (`LoraProvider.dot_general` in qwix 0.1.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "a", "b"],
    meta_fields=["scaling", "name"],
)
@dataclass(frozen=True)
class AdaptedKernel:
    """A kernel with its matrices A [*inputs rank] and B [rank *outputs].

    Inputs are the axes of the kernel that are multiplied away, in its own order, outputs the
    others; either may be one dimension. `name` is for messages.
    """

    kernel: Any
    a: Any
    b: Any
    scaling: float
    name: str
