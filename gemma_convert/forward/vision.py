"""The arithmetic of Gemma 4's vision encoder, whatever tree its weights come from.

Facts: `Gemma4VisionModel` and `Gemma4MultimodalEmbedder` in
`transformers/models/gemma4/modeling_gemma4.py` (5.23). Everything is float32. Padding patches keep
their places and are masked, so that images of all shapes are compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gemma_convert.errors import SourceError
from gemma_convert.forward.arithmetic import product, rms_norm
from gemma_convert.forward.encoder import Encoder, Made, Step, noted, taps
from gemma_convert.forward.sharding import Axes, gather, place, replicated
from gemma_convert.model.architecture import Architecture, VisionArchitecture

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

Params: TypeAlias = Mapping[str, Any]
Leaves: TypeAlias = Mapping[str, jax.Array]

BOUNDS = ("clip_input_min", "clip_input_max", "clip_output_min", "clip_output_max")
"""Names of a clipped linear's four bounds beside its kernel in google/gemma 4.1.0."""


def leaf(tree: Params, *keys: str) -> Any:
    """The array at `keys` of a nested dict; raises SourceError that names the path."""
    found: Any = tree
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    if getattr(found, "shape", None) is None:
        path = "/".join(f"'{key}'" if "/" in key else key for key in keys)
        raise SourceError(
            "An array of the vision or audio encoder is missing in the native checkpoint.",
            expected=path,
            found="nothing" if found is None else "no array",
            do="convert the checkpoint again, with its towers",
        )
    return found


def leaves(tree: Params, place: Sequence[str], names: Iterable[str]) -> dict[str, Any]:
    """Name → array for each of `names`, paths below the keys `place`; raises SourceError."""
    return {name: leaf(tree, *place, *name.split("/")) for name in names}


def bounds_of(linears: Iterable[str]) -> list[str]:
    """Names of the clip bounds of `linears`, four of each."""
    return [f"{linear}/{bound}" for linear in linears for bound in BOUNDS]


def below(place: Sequence[str], axes: Mapping[str, Axes]) -> dict[str, Axes]:
    """`axes`, by paths below the keys `place`, by their whole paths."""
    return {"/".join((*place, name)): named for name, named in axes.items()}


def vision_of(architecture: Architecture) -> VisionArchitecture:
    """Facts of the vision tower; raises SourceError where the model has none."""
    if architecture.vision is None:
        raise SourceError("The model has no vision tower according to its config.json.")
    return architecture.vision


def clipped(equation: str, x: jax.Array, params: Leaves, linear: str, kernel: str) -> jax.Array:
    """The product of `x` and the array `linear/kernel`, both ends of it within their bounds.

    Bounds stand beside the kernel where the model clips: `Gemma4ClippableLinear`.
    """
    weights = params[f"{linear}/{kernel}"]
    if f"{linear}/{BOUNDS[0]}" not in params:
        return product(equation, x, weights)
    low_in, high_in, low, high = (
        params[f"{linear}/{bound}"].astype(jnp.float32) for bound in BOUNDS
    )
    return jnp.clip(product(equation, jnp.clip(x, low_in, high_in), weights), low, high)


def real_patches(positions: Int[Array, "patches 2"]) -> Bool[Array, " patches"]:
    """Which patches are of the image: the processor gives padding the position (-1, -1)."""
    return (positions != -1).any(axis=-1)


def embed_patches(
    pixels: Float[np.ndarray, "patches patch"],
    positions: Int[np.ndarray, "patches 2"],
    kernel: Float[Array, "patch embed"],
    table: Float[Array, "positions 2 embed"],
) -> Float[Array, "patches embed"]:
    """Projected pixels plus the embeddings of x and of y [patches embed]; pixels are of 0 to 1."""
    column, row = np.maximum(np.asarray(positions), 0).T
    where = gather(table, column)[:, 0].astype(jnp.float32)
    where = where + gather(table, row)[:, 1].astype(jnp.float32)
    embedded: jax.Array = _project_pixels(np.asarray(pixels, np.float32), place(kernel))
    return embedded + where


@jax.jit
def _project_pixels(pixels: jax.Array, kernel: jax.Array) -> jax.Array:
    return replicated(product("ip,pe->ie", 2 * (pixels - 0.5), kernel))


def rotary(
    x: Float[Array, "patches heads head_dim"], positions: Int[Array, "patches 2"], theta: float
) -> Float[Array, "patches heads head_dim"]:
    """`x` [patches heads head_dim] turned: one half of each head by x, the other half by y.

    Pairs are (i, i + head_dim / 4) within a half: `Gemma4VisionRotaryEmbedding`.
    """
    half = x.shape[-1] // 2
    exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequency = np.float32(1) / np.float32(theta) ** exponent
    turned = []
    for axis, part in enumerate(jnp.split(x, 2, axis=-1)):
        angle = positions[:, axis, None, None].astype(jnp.float32) * frequency
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        first, second = jnp.split(part, 2, axis=-1)
        turned += [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1)


def attend(
    query: Float[Array, "patches heads head_dim"],
    key: Float[Array, "patches heads head_dim"],
    value: Float[Array, "patches heads head_dim"],
    real: Bool[Array, " patches"],
) -> Float[Array, "patches heads head_dim"]:
    """Values of the real patches mixed by attention [patches heads head_dim], scores unscaled."""
    scores = jnp.where(real, product("qhd,khd->hqk", query, key), -jnp.inf)
    return product("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), value)


def vision_encoder(
    enter: Callable[[], Float[Array, "patches embed"]],
    layers: Iterable[Step],
    leave: Callable[[jax.Array, Made | None], tuple[jax.Array, Made]],
) -> Encoder:
    """The steps of an encoder of one image, by what is particular to a tree."""

    def first(_: None, given: Made | None) -> tuple[jax.Array, Made]:
        tap = taps(given)
        return noted(tap("patch embedding", enter()), tap, given)

    return [first, *layers, leave]


def soft_tokens(
    positions: Int[np.ndarray, "patches 2"],
    vision: VisionArchitecture,
    standard: tuple[Float[Array, " embed"], Float[Array, " embed"]] | None,
    kernel: Float[Array, "embed text"],
    hidden: Float[Array, "patches embed"],
    given: Made | None,
) -> tuple[Float[Array, "tokens text"], Made]:
    """The image's soft tokens in the text model's space [tokens text], without padding.

    `standard` is the scale and the bias of a model that standardises what was pooled. What parts
    make has padding, [patches / pooling² features].
    """
    found, made = _soft_tokens(
        hidden, given, positions, standard, place(kernel), vision.pooling, vision.norm_epsilon
    )
    real = int((positions != -1).any(axis=-1).sum())
    return found[: real // vision.pooling**2], made


@partial(jax.jit, static_argnames=("pooling", "epsilon"))
def _soft_tokens(
    hidden: jax.Array,
    given: Made | None,
    positions: jax.Array,
    standard: tuple[jax.Array, jax.Array] | None,
    kernel: jax.Array,
    pooling: int,
    epsilon: float,
) -> tuple[jax.Array, Made]:
    tap = taps(given)
    pooled = pool(hidden, positions, pooling) * np.float32(hidden.shape[-1] ** 0.5)
    pooled = tap("pooled patches", pooled)
    if standard is not None:
        scale, bias = (array.astype(jnp.float32) for array in standard)
        pooled = tap("standardized patches", (pooled - bias) * scale)
    normed = tap("norm before the projection", rms_norm(pooled, None, epsilon))
    found = replicated(product("te,ed->td", normed, kernel))
    return noted(tap("soft tokens", found), tap, given)


def pool(
    hidden: Float[Array, "patches embed"], positions: Int[Array, "patches 2"], pooling: int
) -> Float[Array, "tokens embed"]:
    """Means over squares of `pooling` × `pooling` patches, row by row; zeros behind the last one.

    Sums are divided by the whole square, as in `Gemma4VisionPooler`.
    """
    real = real_patches(positions)
    column, row = jnp.maximum(positions, 0).T // pooling
    square = column + (positions[:, 0].max() + 1) // pooling * row
    sums = jax.ops.segment_sum(
        jnp.where(real[:, None], hidden, 0.0), square, len(positions) // pooling**2
    )
    return sums / pooling**2
