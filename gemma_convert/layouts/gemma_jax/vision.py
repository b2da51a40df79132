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
from gemma_convert.forward.encoder import Encoder, Made, noted, taps
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
    vision_encoder,
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


def image_encoder(
    tree: Params,
    architecture: Architecture,
    pixels: Float[np.ndarray, "patches patch"],
    positions: Int[np.ndarray, "patches 2"],
) -> Encoder:
    """The steps from one image to its soft tokens [tokens embed], all in float32.

    `pixels` and `positions` are transformers' `pixel_values` and `image_position_ids` of the image,
    padding included; `tree` is the whole tree. Raises SourceError where the model has no vision
    tower or the tree lacks an array of it.
    """
    vision, places = vision_of(architecture), np.asarray(positions)
    entry = leaves(tree, ("vision_encoder", "entry"), _ENTRY)
    standard = None
    if vision.standardize:
        found = leaves(tree, ("vision_encoder", "standardize"), ("scale", "bias"))
        standard = found["scale"], found["bias"]
    projection = leaf(tree, "embedder", "mm_input_projection", "w")
    names = [*_LAYER, *(bounds_of(_LINEARS) if vision.clipped else ())]
    stacked = leaves(tree, _LAYERS, names)
    facts = {"theta": vision.rope_theta, "epsilon": vision.norm_epsilon}
    return vision_encoder(
        lambda: embed_patches(pixels, places, entry["input_projection/w"], entry["pos_emb"]),
        [partial(layer, stacked, index, places, **facts) for index in range(vision.layers)],
        partial(soft_tokens, places, vision, standard, projection),
    )


@partial(jax.jit, static_argnames=("theta", "epsilon"))
def layer(
    stacked: Leaves,
    index: Int[Array, ""],
    positions: Int[Array, "patches 2"],
    hidden: Float[Array, "patches embed"],
    given: Made | None,
    theta: float,
    epsilon: float,
) -> tuple[Float[Array, "patches embed"], Made]:
    """The output [patches embed] of a layer; `stacked` are all layers' arrays, by path.

    Paths are those below the block. Keys and values share their clip bounds, and so do gate and up.
    """
    params, tap = {name: array[index] for name, array in stacked.items()}, taps(given)

    def norm(name: str, x: jax.Array) -> jax.Array:
        return rms_norm(x, params[f"{name}/scale"], epsilon)

    normed = tap("norm before attention", norm("pre_attention_norm", hidden))
    query = clipped("pe,hed->phd", normed, params, "attn/q_einsum", "w")
    key, value = clipped("pe,ched->cphd", normed, params, "attn/kv_einsum", "w")
    query = tap("queries", norm("attn/query_norm", query))
    key = tap("keys", norm("attn/key_norm", key))
    value = tap("values", rms_norm(value, None, epsilon))
    query, key = rotary(query, positions, theta), rotary(key, positions, theta)
    mixed = tap("attention", attend(query, key, value, real_patches(positions)))
    attended = clipped("phd,hde->pe", mixed, params, "attn/attn_vec_einsum", "w")
    attended = norm("post_attention_norm", tap("output projection", attended))
    hidden = tap("sum behind attention", hidden + tap("norm behind attention", attended))
    feed = tap("norm before the MLP", norm("pre_ffw_norm", hidden))
    gate, up = clipped("pe,cme->cpm", feed, params, "mlp/gating_einsum", "w")
    fed = tap("dense MLP", clipped("pm,me->pe", gelu(gate) * up, params, "mlp/linear", "w"))
    fed = tap("norm behind the MLP", norm("post_ffw_norm", fed))
    return noted(tap("output", replicated(hidden + fed)), tap, given)
