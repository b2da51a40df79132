"""MaxText's parameter tree and an image's patches → soft tokens: the vision encoder in JAX.

Kernels are used as MaxText lays them out, never through a mapping table. Layout: MaxText
(August 2026), 26B-A4B and 31B, which have no clip bounds. Arithmetic: `forward/vision.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from gemma_convert.forward.arithmetic import gelu, product, rms_norm
from gemma_convert.forward.encoder import Encoder, Made, noted, taps
from gemma_convert.forward.sharding import Axes, replicated
from gemma_convert.forward.vision import (
    Leaves,
    Params,
    attend,
    below,
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

_ENCODER = ("vision_encoder", "Gemma4VisionEncoderLayer_0")
_PROJECTOR = ("vision_encoder", "Gemma4VisionProjector_0")
_ENTRY: Mapping[str, Axes] = {
    "input_projection/kernel": ("patch", "embed"),
    "pos_emb_param": ("positions", "sides", "embed"),
}
_LAYER: Mapping[str, Axes] = {
    "pre_attention_norm/scale": ("embed",),
    "attention/query/kernel": ("embed", "heads", "head_dim"),
    "attention/key/kernel": ("embed", "heads", "head_dim"),
    "attention/value/kernel": ("embed", "heads", "head_dim"),
    "attention/out/kernel": ("heads", "head_dim", "embed"),
    "attention/query_norm/scale": ("head_dim",),
    "attention/key_norm/scale": ("head_dim",),
    "post_attention_norm/scale": ("embed",),
    "pre_ffw_norm/scale": ("embed",),
    "mlp/wi_0/kernel": ("embed", "mlp"),
    "mlp/wi_1/kernel": ("embed", "mlp"),
    "mlp/wo/kernel": ("mlp", "embed"),
    "post_ffw_norm/scale": ("embed",),
}


def axes(architecture: Architecture) -> dict[str, Axes]:
    """The axes of the tower's arrays by path below params/params; vectors are left out."""
    found = below((*_ENCODER, "vision_entry"), _ENTRY)
    for index in range(vision_of(architecture).layers):
        found |= below((*_ENCODER, f"layer_{index}"), _LAYER)
    return found | below(_PROJECTOR, {"projection/kernel": ("output", "embed")})


def image_encoder(
    tree: Params,
    architecture: Architecture,
    pixels: Float[np.ndarray, "patches patch"],
    positions: Int[np.ndarray, "patches 2"],
) -> Encoder:
    """The steps from one image to its soft tokens [tokens embed], all in float32.

    `pixels` and `positions` are transformers' `pixel_values` and `image_position_ids` of the image,
    padding included; `tree` is the dict below params/params. Raises SourceError where the model has
    no vision tower or the tree lacks an array of it.
    """
    vision, places = vision_of(architecture), np.asarray(positions)
    entry = leaves(tree, (*_ENCODER, "vision_entry"), _ENTRY)
    standard = None
    if vision.standardize:
        standard = leaf(tree, *_ENCODER, "std_scale"), leaf(tree, *_ENCODER, "std_bias")
    projection = leaf(tree, *_PROJECTOR, "projection", "kernel")
    layers = [leaves(tree, (*_ENCODER, f"layer_{index}"), _LAYER) for index in range(vision.layers)]
    facts = {"theta": vision.rope_theta, "epsilon": vision.norm_epsilon}
    return vision_encoder(
        lambda: embed_patches(
            pixels, places, entry["input_projection/kernel"], entry["pos_emb_param"]
        ),
        [partial(layer, params, places, **facts) for params in layers],
        partial(soft_tokens, places, vision, standard, projection),
    )


@partial(jax.jit, static_argnames=("theta", "epsilon"))
def layer(
    params: Leaves,
    positions: Int[Array, "patches 2"],
    hidden: Float[Array, "patches embed"],
    given: Made | None,
    theta: float,
    epsilon: float,
) -> tuple[Float[Array, "patches embed"], Made]:
    """The layer's output [patches embed]; `params` are its arrays by their paths below it."""
    tap = taps(given)

    def norm(name: str, x: jax.Array) -> jax.Array:
        return rms_norm(x, params[f"{name}/scale"], epsilon)

    normed = tap("norm before attention", norm("pre_attention_norm", hidden))
    query, key, value = (
        product("pe,ehd->phd", normed, params[f"attention/{name}/kernel"])
        for name in ("query", "key", "value")
    )
    query = tap("queries", norm("attention/query_norm", query))
    key = tap("keys", norm("attention/key_norm", key))
    value = tap("values", rms_norm(value, None, epsilon))
    query, key = rotary(query, positions, theta), rotary(key, positions, theta)
    mixed = tap("attention", attend(query, key, value, real_patches(positions)))
    attended = tap(
        "output projection", product("phd,hde->pe", mixed, params["attention/out/kernel"])
    )
    attended = tap("norm behind attention", norm("post_attention_norm", attended))
    hidden = tap("sum behind attention", hidden + attended)
    feed = tap("norm before the MLP", norm("pre_ffw_norm", hidden))
    gate = product("pe,em->pm", feed, params["mlp/wi_0/kernel"])
    up = product("pe,em->pm", feed, params["mlp/wi_1/kernel"])
    fed = tap("dense MLP", product("pm,me->pe", gelu(gate) * up, params["mlp/wo/kernel"]))
    fed = tap("norm behind the MLP", norm("post_ffw_norm", fed))
    return noted(tap("output", replicated(hidden + fed)), tap, given)
