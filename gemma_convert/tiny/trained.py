"""Values with statistics like a trained model's, for tensors of any width.

Hidden states keep their size through all layers, and little is amplified: a relative error of 1e-6
behind the embedding is about five times as large behind a dozen layers, and 13 times behind a
tiny E2B's 35, where wild ones make it 1,500 times as large (`tests/test_weights.py`). The first
layer writes most of what the embedding becomes, later ones write ever less beside it, and each
layer's scalar takes the state back to about the size that it had. So they go from 0.17 to 0.98 with
the depth. The trained 12B's are all below one too, 0.005 to 0.92, their mean 0.62
(https://github.com/cloudrift-ai/emmy/pull/371); no published weights were read for the other
ranges. No scale is one for a whole tensor and no two tensors are equal, so that a mistake is seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod, sqrt
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_convert.tiny.weights import Shape, seeded

Float32: TypeAlias = npt.NDArray[np.float32]
Statistics: TypeAlias = Callable[[str, Shape], tuple[float, float]]
"""Name and shape of a tensor → mean and standard deviation of its values."""

FIRST_WRITE, LATER_WRITE = 4.0, 0.5
"""What the first layer adds to the embedding, whose size is one, and layer n adds times √n."""


def trained_values(name: str, shape: Shape, seed: int, count: int) -> Float32:
    """The first `count` values of the tensor [count], determined by seed and name.

    They are sums of four uniform ones, nearly normal and within 3.5 standard deviations: their bits
    depend on no mathematical library.
    """
    statistics = next((given for pattern, given in _STATISTICS if pattern.search(name)), _matrix)
    mean, deviation = statistics(name, shape)
    generator = seeded(name, seed)
    values = generator.random(count, np.float32)
    for _ in range(3):
        values += generator.random(count, np.float32)
    values -= np.float32(2)
    values *= np.float32(sqrt(3) * deviation)
    values += np.float32(mean)
    return values


def _about(mean: float, deviation: float) -> Statistics:
    return lambda name, shape: (mean, deviation)


def _matrix(name: str, shape: Shape, gain: float = 1.0) -> tuple[float, float]:
    """A matrix, convolution or table [outputs, ...inputs], or one an expert [experts, ...]."""
    inputs = shape[-1] if ".experts." in name else prod(shape[1:])
    return 0.0, gain / sqrt(inputs)


def _key_norm(name: str, shape: Shape) -> tuple[float, float]:
    """Gemma 4 divides no attention score by √head_dim: its norms of keys do [head_dim]."""
    mean = 1.5 / sqrt(shape[0])
    return mean, 0.25 * mean


def _layer(name: str) -> int:
    match = _TEXT_LAYER.match(name)
    return int(match[1]) if match else 0


def _write(layer: int) -> float:
    return LATER_WRITE / sqrt(layer) if layer else FIRST_WRITE


def _post_norm(name: str, shape: Shape) -> tuple[float, float]:
    mean = _write(_layer(name))
    return mean, 0.25 * mean


def _layer_scalar(name: str, shape: Shape) -> tuple[float, float]:
    """What undoes the growth by two things that a layer of this index adds to a state of one.

    Every second one is less than that, so that neighbours differ in bfloat16.
    """
    layer = _layer(name)
    scale = (0.94 if layer % 2 else 0.98) / sqrt(1 + 2 * _write(layer) ** 2)
    return scale, 0.004 * scale


_TEXT_LAYER = re.compile(r"model\.(?:language_model\.)?layers\.(\d+)\.")
_STATISTICS: tuple[tuple[re.Pattern[str], Statistics], ...] = tuple(
    (re.compile(pattern), statistics)
    for pattern, statistics in {
        r"_min$": _about(-16, 2),
        r"_max$": _about(16, 2),
        r"layer_scalar$": _layer_scalar,
        _TEXT_LAYER.pattern + r"post_\w+\.weight$": _post_norm,
        r"self_attn\.k_norm\.weight$": _key_norm,
        r"^model\.(language_model\.)?norm\.weight$": _about(2.5, 0.5),
        r"(norm\w*|patch_ln\d)\.weight$": _about(1, 0.25),
        r"(router\.scale|per_expert_scale|std_scale)$": _about(1, 0.2),
        r"per_dim_scale$": _about(0.4, 0.1),
        r"(std_bias|\.bias)$": _about(0, 0.3),
        # One row of the table holds every layer's part, each scaled by the root of its own width.
        r"embed_tokens_per_layer\.weight$": _about(0, 0.1),
        r"(position_embedding_table|pos_embedding)$": _about(0, 0.5),
        r"router\.proj\.weight$": _about(0, 1.5),
    }.items()
)
"""Statistics by the first pattern that a name matches; other tensors are matrices."""
