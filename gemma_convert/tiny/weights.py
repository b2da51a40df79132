"""Random arrays of a tiny model: one per tensor, each from its own generator.

The ranges keep a signal alive through every layer and its logits a few units wide, and keep every
scale, norm and bound away from the value at which losing it would not be noticed. Draws are
uniform: their bits depend on no mathematical library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod, sqrt
from typing import TypeAlias
from zlib import crc32

import numpy as np
import numpy.typing as npt

from gemma_convert.arrays.dtypes import numpy_dtype

Array: TypeAlias = npt.NDArray[np.generic]
Float64: TypeAlias = npt.NDArray[np.float64]
Shape: TypeAlias = tuple[int, ...]
Draw: TypeAlias = Callable[[np.random.Generator, Shape], Float64]

EMBEDDING_SPREAD = 2.5
"""Standard deviation of a scaled embedding, and about that of the logits."""


def random_weights(shapes: Mapping[str, Shape], seed: int, dtype: str) -> dict[str, Array]:
    """One array of `dtype` per name in `shapes`, [shape of the name], determined by seed and name.

    Keys and values of one vision layer share their clip bounds, and so do gate and up, as in
    google/gemma-4-E2B-it and -E4B-it.
    """
    return {name: random_tensor(name, shape, seed, dtype) for name, shape in shapes.items()}


def random_tensor(name: str, shape: Shape, seed: int, dtype: str) -> Array:
    """The array of one tensor [shape], independent of all the others."""
    generator = seeded(name, seed)
    draw = next((draw for pattern, draw in _DRAWS if pattern.search(name)), None)
    values = _matrix(generator, shape) if draw is None else draw(generator, shape)
    array: Array = values.astype(np.float32).astype(numpy_dtype(dtype))
    return array


def seeded(name: str, seed: int) -> np.random.Generator:
    """The generator of one tensor's values, whatever their kind."""
    return np.random.default_rng([seed, crc32(_seed_name(name).encode())])


def _seed_name(name: str) -> str:
    """The name that seeds a tensor: the text-only model has the same weights as the whole one."""
    name = name.replace("model.language_model.", "model.", 1)
    if name.startswith("model.vision_tower.") and _BOUND.search(name):
        name = re.sub(r"\.[kv]_proj\.", ".kv_proj.", name)
        name = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name)
    return name


def _between(low: float, high: float) -> Draw:
    """Values from `low` to `high`."""
    return lambda generator, shape: low + (high - low) * generator.random(shape)


def _around(low: float, high: float) -> Draw:
    """Values whose size is from `low` to `high`, of either sign."""

    def draw(generator: np.random.Generator, shape: Shape) -> Float64:
        signs: Float64 = np.where(generator.random(shape) < 0.5, -1.0, 1.0)
        return signs * (low + (high - low) * generator.random(shape))

    return draw


def _off_one(low: float, high: float, gap: float = 0.1) -> Draw:
    """Values from `low` to `high`, none of them within `gap` of one."""

    def draw(generator: np.random.Generator, shape: Shape) -> Float64:
        values: Float64 = low + (high - low - 2 * gap) * generator.random(shape)
        return np.where(values > 1 - gap, values + 2 * gap, values)

    return draw


def _spread(deviation: float) -> Draw:
    """Values of mean zero and standard deviation `deviation`."""
    return _between(-sqrt(3) * deviation, sqrt(3) * deviation)


def _table(spread: float) -> Draw:
    """An embedding table, which the model multiplies by the root of its width [rows, width].

    As an output head it gives logits of this spread.
    """

    def draw(generator: np.random.Generator, shape: Shape) -> Float64:
        return _spread(spread / sqrt(shape[-1]))(generator, shape)

    return draw


def _matrix(generator: np.random.Generator, shape: Shape, gain: float = 1.0) -> Float64:
    """A matrix or convolution that keeps the spread of its inputs [outputs, ...inputs]."""
    return _spread(gain / sqrt(prod(shape[1:])))(generator, shape)


def _experts(generator: np.random.Generator, shape: Shape) -> Float64:
    """The stacked matrices of the experts [experts, outputs, inputs]."""
    return _spread(1 / sqrt(shape[-1]))(generator, shape)


def _router(generator: np.random.Generator, shape: Shape) -> Float64:
    """The router, which the model divides by the root of its inputs' width [experts, inputs]."""
    return _spread(1.5)(generator, shape)


def _gate(generator: np.random.Generator, shape: Shape) -> Float64:
    """A gate on a hidden state that no norm goes before [gates, inputs].

    Gates so negative that all of GELU's outputs nearly vanish would be blown up by the norm behind
    them, and float32 noise with them; a published model has too many gates for that.
    """
    return _matrix(generator, shape, 0.3)


def _projection(generator: np.random.Generator, shape: Shape) -> Float64:
    """Soft tokens into the text model's space, as wide as its scaled embeddings."""
    return _matrix(generator, shape, EMBEDDING_SPREAD)


_BOUND = re.compile(r"\.(input|output)_(min|max)$")


def _compiled(rules: Mapping[str, Draw]) -> tuple[tuple[re.Pattern[str], Draw], ...]:
    return tuple((re.compile(pattern), draw) for pattern, draw in rules.items())


_DRAWS = _compiled(
    {
        r"_min$": _between(-3.5, -1.5),
        r"_max$": _between(1.5, 3.5),
        r"layer_scalar$": _between(0.82, 0.95),
        r"self_attn\.[qk]_norm\.weight$": _between(0.25, 0.6),
        r"(norm\w*|patch_ln\d)\.weight$": _off_one(0.6, 1.6),
        r"(router\.scale|per_expert_scale|std_scale)$": _off_one(0.5, 1.6),
        r"per_dim_scale$": _around(0.2, 0.9),
        r"(std_bias|output_proj\.bias)$": _around(0.2, 1.5),
        r"vision_embedder\.\w+\.bias$": _around(0.2, 0.9),
        r"(embed_tokens|lm_head)\.weight$": _table(EMBEDDING_SPREAD),
        # One row of the table holds every layer's part, each scaled by the root of its own width.
        r"embed_tokens_per_layer\.weight$": _spread(0.4),
        r"(position_embedding_table|pos_embedding)$": _spread(0.5),
        r"per_layer_input_gate\.weight$": _gate,
        r"embedding_projection\.weight$": _projection,
        r"router\.proj\.weight$": _router,
        r"experts\.(gate_up|down)_proj$": _experts,
    }
)
"""What a tensor is drawn from, by the first pattern its name matches; other ones are matrices."""
