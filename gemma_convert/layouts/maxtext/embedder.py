"""MaxText's parameter tree and an image's patches → soft tokens: the embedder of 12B in JAX.

Kernels are used as MaxText lays them out, never through a mapping table. Layout and arithmetic:
`Gemma4UnifiedVisionEmbedder` and `Gemma4VisionProjector` in `models/gemma4_vision.py`, MaxText at
85b12b8. All of its norms have the epsilon of the text model's, those with biases too, for which
transformers has that of PyTorch, 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from gemma_convert.errors import SourceError
from gemma_convert.forward.arithmetic import layer_norm, product, rms_norm
from gemma_convert.forward.encoder import Encoder, Made, noted, taps
from gemma_convert.forward.sharding import Axes, gather, replicated
from gemma_convert.forward.vision import Leaves, Params, below, leaf, leaves
from gemma_convert.model.architecture import Architecture

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_EMBEDDER = ("vision_encoder", "Gemma4UnifiedVisionEmbedder_0")
_PROJECTOR = ("vision_encoder", "Gemma4VisionProjector_0")
_LEAVES: Mapping[str, Axes] = {
    "patch_ln1/scale": ("patch",),
    "patch_ln1/bias": ("patch",),
    "patch_dense/kernel": ("patch", "embed"),
    "patch_dense/bias": ("embed",),
    "patch_ln2/scale": ("embed",),
    "patch_ln2/bias": ("embed",),
    "pos_emb_param": ("positions", "sides", "embed"),
    "pos_norm/scale": ("embed",),
    "pos_norm/bias": ("embed",),
}


def axes() -> dict[str, Axes]:
    """The axes of the embedder's arrays by path below params/params."""
    found = below(_EMBEDDER, _LEAVES)
    return found | below(_PROJECTOR, {"projection/kernel": ("output", "embed")})


def image_encoder(
    tree: Params,
    architecture: Architecture,
    pixels: Float[np.ndarray, "patches patch"],
    positions: Int[np.ndarray, "patches 2"],
) -> Encoder:
    """The two steps from one image to its soft tokens [tokens embed], in float32.

    `pixels` and `positions` are those of squares of patches, padding included; `tree` is the dict
    below params/params. Raises SourceError where the tree lacks an array of the embedder, or has
    one of another shape.
    """
    params = leaves(tree, _EMBEDDER, _LEAVES)
    kernel = leaf(tree, *_PROJECTOR, "projection", "kernel")
    _check_shapes({**params, "projection/kernel": kernel}, architecture)
    places, epsilon = np.asarray(positions), architecture.text.norm_epsilon
    real = int((places != -1).any(axis=-1).sum())

    def embed(_: None, given: Made | None) -> tuple[jax.Array, Made]:
        table = params["pos_emb_param"]
        column, row = np.maximum(places, 0).T
        where = jnp.stack([gather(table, column)[:, 0], gather(table, row)[:, 1]], 1)
        where = jnp.where(jnp.asarray(places != -1)[..., None], where.astype(jnp.float32), 0)
        tap, image = taps(given), np.asarray(pixels, np.float32)
        found = _embedded(params, image, where.sum(1), epsilon)
        return noted(tap("patch embedding", found), tap, given)

    def project(hidden: jax.Array, given: Made | None) -> tuple[jax.Array, Made]:
        tap = taps(given)
        normed = tap("norm before the projection", rms_norm(hidden, None, epsilon))
        found = tap("soft tokens", replicated(product("te,ed->td", normed, kernel)))
        return noted(found[:real], tap, given)

    return [embed, project]


def _check_shapes(params: Leaves, architecture: Architecture) -> None:
    vision = architecture.vision_embedder
    assert vision is not None
    sizes = {"patch": vision.patch, "embed": vision.embed, "positions": vision.positions}
    for name, array in params.items():
        named = _LEAVES.get(name)
        size = (vision.embed, architecture.text.embed)
        expected = size if named is None else tuple(sizes.get(str(axis), 2) for axis in named)
        if array.shape != expected:
            raise SourceError(
                "An array of the vision embedder has an unexpected shape.",
                where=name,
                expected=list(expected),
                found=list(array.shape),
                do="give the config.json of the model that was converted",
            )


@partial(jax.jit, static_argnames=("epsilon",))
def _embedded(
    params: Leaves,
    pixels: Float[Array, "patches patch"],
    where: Float[Array, "patches embed"],
    epsilon: float,
) -> Float[Array, "patches embed"]:
    def norm(name: str, x: jax.Array) -> jax.Array:
        return layer_norm(x, params[f"{name}/scale"], params[f"{name}/bias"], epsilon)

    hidden = product("ip,pe->ie", norm("patch_ln1", pixels), params["patch_dense/kernel"])
    hidden = norm("patch_ln2", hidden + params["patch_dense/bias"].astype(jnp.float32))
    found: jax.Array = replicated(norm("pos_norm", hidden + where))
    return found
