"""The arithmetic that every Gemma 4 layer is made of, whatever tree its weights come from.

Facts: `transformers/models/gemma4/modeling_gemma4.py` and `transformers/modeling_rope_utils.py`
(5.23). Norms, angles, softmax and routing are computed in float32 whatever the dtype of `x`.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_convert.errors import SourceError
from gemma_convert.forward.adapted_kernel import AdaptedKernel
from gemma_convert.forward.sharding import replicated
from gemma_convert.model.architecture import Rope, TextArchitecture

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


def product(
    equation: str, x: jax.Array, kernel: jax.Array | AdaptedKernel, result: Any | None = None
) -> jax.Array:
    """einsum in x's dtype, with full float32 precision on accelerators that would save on it.

    Of an adapted kernel it has what its adapter adds.
    """
    if isinstance(kernel, AdaptedKernel):
        made = product(equation, x, kernel.kernel, result)
        return made + kernel.scaling * _through_matrices(equation, x, kernel, result)
    return jnp.einsum(
        equation,
        x,
        kernel.astype(x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=result or x.dtype,
    )


def _through_matrices(
    equation: str, x: jax.Array, adapted: AdaptedKernel, result: Any | None
) -> jax.Array:
    """x · A · B by the axes of the kernel's own product.

    Raises SourceError where the matrices do not fit the kernel.
    """
    operands, output = equation.split("->")
    of_x, of_kernel = operands.split(",")
    length = dict(zip(of_kernel, adapted.kernel.shape, strict=True))
    inputs = "".join(axis for axis in of_kernel if axis in of_x)
    outputs = "".join(axis for axis in of_kernel if axis not in of_x)
    taken, given = [length[axis] for axis in inputs], [length[axis] for axis in outputs]
    rank = adapted.a.shape[-1]
    fits_a = adapted.a.shape in {(*taken, rank), (prod(taken), rank)}
    if not fits_a or adapted.b.shape not in {(rank, *given), (rank, prod(given))}:
        raise SourceError(
            "The matrices of the adapter do not fit the array that they change.",
            where=f"array {adapted.name}",
            expected=f"A {[*taken, rank]} and B {[rank, *given]}",
            found=f"A {list(adapted.a.shape)} and B {list(adapted.b.shape)}",
            do="name the conversion of the model that it was trained on with --native-base",
        )
    kept = "".join(axis for axis in of_x if axis not in inputs)
    low = product(f"{of_x},{inputs}R->{kept}R", x, adapted.a.reshape(*taken, rank))
    return product(f"{kept}R,R{outputs}->{output}", low, adapted.b.reshape(rank, *given), result)


def rms_norm(
    x: Float[Array, "*places size"], scale: Float[Array, " size"] | None, epsilon: float
) -> Float[Array, "*places size"]:
    """`x` over its root mean square, times `scale` itself (no + 1), computed in float32."""
    precise = x.astype(jnp.float32)
    normed = precise * jax.lax.rsqrt(jnp.mean(jnp.square(precise), -1, keepdims=True) + epsilon)
    if scale is not None:
        normed = normed * jnp.asarray(scale).astype(jnp.float32)
    return normed.astype(x.dtype)


def layer_norm(
    x: Float[Array, "*places size"],
    scale: Float[Array, " size"],
    bias: Float[Array, " size"],
    epsilon: float,
) -> Float[Array, "*places size"]:
    """`x` less its mean, over its standard deviation, times `scale` and plus `bias`, in float32."""
    precise = x.astype(jnp.float32)
    precise = precise - jnp.mean(precise, -1, keepdims=True)
    normed = precise * jax.lax.rsqrt(jnp.mean(jnp.square(precise), -1, keepdims=True) + epsilon)
    normed = normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return normed.astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh approximation, `gelu_pytorch_tanh`."""
    return jax.nn.gelu(x, approximate=True)


def rotary(
    x: Float[Array, "batch length heads head_dim"], rope: Rope
) -> Float[Array, "batch length heads head_dim"]:
    """`x` [batch length heads head_dim] turned by its positions; pairs are (i, i + head_dim / 2).

    A fraction of the pairs turns, with frequencies spread over the whole head: "proportional" RoPE,
    `transformers/modeling_rope_utils.py`.
    """
    head_dim = x.shape[-1]
    turning = int(rope.fraction * head_dim // 2)
    frequency = np.zeros(head_dim // 2, np.float32)
    exponent = np.arange(0, 2 * turning, 2, dtype=np.float32) / np.float32(head_dim)
    frequency[:turning] = np.float32(1) / np.float32(rope.theta) ** exponent
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    seen: Bool[Array, "rows length length"],
) -> Float[Array, "batch length heads head_dim"]:
    """Values mixed by attention [batch length heads head_dim]; scores are not scaled.

    Neighbouring query heads share one key and value head. `seen` are the keys by query, as
    `visible` has them.
    """
    batch, length, kv_heads, head_dim = key.shape
    grouped = query.reshape(batch, length, kv_heads, -1, head_dim)
    scores = product("bqkgd,bskd->bkgqs", grouped, key, jnp.float32)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return product("bkgqs,bskd->bqkgd", weights, value).reshape(query.shape)


def visible(
    length: int,
    window: int | None,
    images: Int[Array, "batch length"] | None = None,
    whole: bool = False,
) -> Bool[Array, "rows length length"]:
    """Which keys a query sees [rows query key]: itself, and `window` - 1 or all of those before it.

    Tokens of one image (equal numbers other than 0) see each other both ways; the window bounds how
    far back, never how far forward (`create_masks_for_vision_model` of transformers), or neither
    where images are `whole` (`create_masks_for_generate`). One row serves the whole batch where
    there are no images.
    """
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    seen = (key <= query)[None]
    near = jnp.ones_like(seen) if window is None else (key > query - window)[None]
    if images is None:
        return seen & near
    same = (images[:, :, None] == images[:, None, :]) & (images != 0)[:, :, None]
    return seen & near | same if whole else (seen | same) & near


def routing(
    scores: Float[Array, "batch length experts"],
    per_expert_scale: Float[Array, " experts"],
    experts_per_token: int,
) -> Float[Array, "batch length experts"]:
    """Weight of each expert [batch length experts], zero for all but the best of each token.

    The best ones' probabilities are made to sum to one, then multiplied by each expert's own scale.
    """
    probability = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    best, chosen = jax.lax.top_k(probability, experts_per_token)
    best = best / best.sum(axis=-1, keepdims=True)
    best = best * per_expert_scale.astype(jnp.float32)[chosen]
    places = jax.nn.one_hot(chosen, probability.shape[-1], dtype=jnp.float32)
    return (best[..., None] * places).sum(axis=-2)


def head(
    table: Float[Array, "vocab embed"],
    hidden: Float[Array, "batch positions embed"],
    text: TextArchitecture,
) -> Float[Array, "batch positions vocab"]:
    """Logits [batch positions vocab] in float32, soft-capped where the model caps them."""
    logits: jax.Array = _head(table, hidden, text.logit_softcap)
    return logits


@partial(jax.jit, static_argnames=("softcap",))
def _head(table: jax.Array, hidden: jax.Array, softcap: float | None) -> jax.Array:
    logits = product("ble,ve->blv", hidden, table, jnp.float32)
    return replicated(logits if softcap is None else jnp.tanh(logits / softcap) * softcap)
