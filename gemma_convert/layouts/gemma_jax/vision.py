"""The gemma library's parameter tree and an image's patches → soft tokens, in JAX.

Kernels are used as google/gemma 4.1.0 lays them out, never through a mapping table: encoder layers
are stacked on the first axis. Arithmetic: `forward/vision.py`, so padding patches are masked as in
transformers, where the library itself adds its mask to the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from gemma_convert.forward.arithmetic import gelu, rms_norm
from gemma_convert.forward.sharding import Axes, replicated
from gemma_convert.forward.vision import (
    Leaves,
    Params,
    attend,
    below,
    bounds_of,
    clipped,
    embed_patches,
    leaf,
    leaves,
    real_patches,
    rotary,
    soft_tokens,
    vision_of,
)
from gemma_convert.model.architecture import Architecture

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_LAYERS = ("vision_encoder", "transformer", "stacked_layers", "block")
_ENTRY: Mapping[str, Axes] = {
    "input_projection/w": ("patch", "embed"),
    "pos_emb": ("positions", "sides", "embed"),
}
_LINEARS: Mapping[str, Axes] = {
    "attn/q_einsum": ("layers", "heads", "embed", "head_dim"),
    "attn/kv_einsum": ("layers", "kv", "heads", "embed", "head_dim"),
    "attn/attn_vec_einsum": ("layers", "heads", "head_dim", "embed"),
    "mlp/gating_einsum": ("layers", "gate_up", "mlp", "embed"),
    "mlp/linear": ("layers", "mlp", "embed"),
}
_NORMS = (
    "pre_attention_norm",
    "attn/query_norm",
    "attn/key_norm",
    "post_attention_norm",
    "pre_ffw_norm",
    "post_ffw_norm",
)
_LAYER = (*(f"{linear}/w" for linear in _LINEARS), *(f"{norm}/scale" for norm in _NORMS))


def axes(architecture: Architecture) -> dict[str, Axes]:
    """The axes of the tower's arrays by path; norms and clip bounds are left out."""
    found = below(("vision_encoder", "entry"), _ENTRY)
    found |= below(_LAYERS, {f"{linear}/w": named for linear, named in _LINEARS.items()})
    return found | {"embedder/mm_input_projection/w": ("output", "embed")}


def encode_image(
    tree: Params,
    architecture: Architecture,
    pixels: Float[np.ndarray, "patches patch"],
    positions: Int[np.ndarray, "patches 2"],
) -> Float[Array, "tokens embed"]:
    """Soft tokens [tokens embed] of one image in float32, as the text model's layers get them.

    `pixels` and `positions` are transformers' `pixel_values` and `image_position_ids` of the image,
    padding included; `tree` is the whole tree. Raises SourceError where the model has no vision
    tower or the tree lacks an array of it.
    """
    vision = vision_of(architecture)
    entry = leaves(tree, ("vision_encoder", "entry"), _ENTRY)
    standard = None
    if vision.standardize:
        found = leaves(tree, ("vision_encoder", "standardize"), ("scale", "bias"))
        standard = found["scale"], found["bias"]
    projection = leaf(tree, "embedder", "mm_input_projection", "w")
    names = [*_LAYER, *(bounds_of(_LINEARS) if vision.clipped else ())]
    hidden = embed_patches(pixels, positions, entry["input_projection/w"], entry["pos_emb"])
    hidden = _layers(
        leaves(tree, _LAYERS, names),
        hidden,
        np.asarray(positions),
        vision.rope_theta,
        vision.norm_epsilon,
    )
    return soft_tokens(hidden, positions, vision, standard, projection)


@partial(jax.jit, static_argnames=("theta", "epsilon"))
def _layers(
    stacked: Leaves, hidden: jax.Array, positions: jax.Array, theta: float, epsilon: float
) -> jax.Array:
    def step(hidden: jax.Array, params: Leaves) -> tuple[jax.Array, None]:
        return layer(params, hidden, positions, theta, epsilon), None

    return replicated(jax.lax.scan(step, hidden, stacked)[0])


def layer(
    params: Leaves,
    hidden: Float[Array, "patches embed"],
    positions: Int[Array, "patches 2"],
    theta: float,
    epsilon: float,
) -> Float[Array, "patches embed"]:
    """The layer's output [patches embed]; `params` are its arrays by their paths below the block.

    Keys and values share their clip bounds, and so do gate and up.
    """

    def norm(name: str, x: jax.Array) -> jax.Array:
        return rms_norm(x, params[f"{name}/scale"], epsilon)

    normed = norm("pre_attention_norm", hidden)
    query = clipped("pe,hed->phd", normed, params, "attn/q_einsum", "w")
    key, value = clipped("pe,ched->cphd", normed, params, "attn/kv_einsum", "w")
    query = rotary(norm("attn/query_norm", query), positions, theta)
    key = rotary(norm("attn/key_norm", key), positions, theta)
    mixed = attend(query, key, rms_norm(value, None, epsilon), real_patches(positions))
    attended = clipped("phd,hde->pe", mixed, params, "attn/attn_vec_einsum", "w")
    hidden = hidden + norm("post_attention_norm", attended)
    feed = norm("pre_ffw_norm", hidden)
    gate, up = clipped("pe,cme->cpm", feed, params, "mlp/gating_einsum", "w")
    fed = clipped("pm,me->pe", gelu(gate) * up, params, "mlp/linear", "w")
    return hidden + norm("post_ffw_norm", fed)
