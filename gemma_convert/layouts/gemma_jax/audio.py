"""The gemma library's parameter tree and a clip's mel frames → soft tokens, in JAX.

Kernels are used as google/gemma 4.1.0 lays them out, never through a mapping table. Arithmetic:
`Gemma4AudioModel` and `Gemma4MultimodalEmbedder` in
`transformers/models/gemma4/modeling_gemma4.py` (5.23), in float32. The library itself attends over
one frame more, and projects before it normalises. Constants are the defaults of
`Gemma4AudioConfig`, which the published models keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import e, log
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from gemma_convert.errors import SourceError
from gemma_convert.forward.arithmetic import product, rms_norm
from gemma_convert.forward.encoder import Encoder, Made, noted, taps
from gemma_convert.forward.parts import Taps
from gemma_convert.forward.sharding import Axes, replicated
from gemma_convert.forward.vision import Leaves, Params, below, bounds_of, clipped, leaf, leaves
from gemma_convert.model.architecture import Architecture, AudioArchitecture

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

WINDOW = 12
"""Frames that a frame sees, itself included: `attention_context_left` - 1."""

_LOGIT_CAP = 50.0
_RESIDUAL_WEIGHT = 0.5
_LARGEST = 1e10  # gradient_clipping, which transformers applies to activations
_EPSILON = 1e-6
_LONGEST_WAVE = 10000.0

_FEATURE: Mapping[str, Axes] = {
    "subsampling_0/kernel": ("time", "bands", "channels", "deeper"),
    "norm_0/scale": ("deeper",),
    "subsampling_1/kernel": ("time", "bands", "channels", "deeper"),
    "norm_1/scale": ("deeper",),
    "input_proj/kernel": ("bands", "channels", "embed"),
}
_LINEARS: Mapping[str, Axes] = {
    **{f"{end}/ffn_layer1": ("embed", "mlp") for end in ("fflayer_start", "fflayer_end")},
    **{f"{end}/ffn_layer2": ("mlp", "embed") for end in ("fflayer_start", "fflayer_end")},
    "trans_atten/self_atten/query": ("embed", "attended"),
    "trans_atten/self_atten/key": ("embed", "attended"),
    "trans_atten/self_atten/value": ("embed", "attended"),
    "trans_atten/post": ("heads", "head_dim", "embed"),
    "lconv/linear_start": ("embed", "doubled"),
    "lconv/linear_end": ("output", "embed"),
}
_NORMS = (
    *(
        f"{end}/{at}_layer_norm"
        for end in ("fflayer_start", "fflayer_end")
        for at in ("pre", "post")
    ),
    "trans_atten/pre_norm",
    "trans_atten/post_norm",
    "lconv/ln",
    "lconv/conv_norm",
    "final_ln",
)
_WAVES = "trans_atten/self_atten/relative_position_embedding/pos_proj/kernel"
_LAYER = (
    *(f"{linear}/kernel" for linear in _LINEARS),
    *(f"{norm}/scale" for norm in _NORMS),
    "trans_atten/self_atten/per_dim_scale",
    _WAVES,
    "lconv/depthwise_conv1d/kernel",
)


def axes(architecture: Architecture) -> dict[str, Axes]:
    """The axes of the tower's arrays by path; norms, clip bounds and small kernels are left out."""
    kernels = {f"{linear}/kernel": named for linear, named in _LINEARS.items()}
    kernels[_WAVES] = ("embed", "heads", "head_dim")
    found = below(("audio_encoder", "feature"), _FEATURE)
    for index in range(_audio_of(architecture).layers):
        found |= below(("audio_encoder", f"conformer/stacked_layers_{index}"), kernels)
    found["audio_encoder/output_projection/kernel"] = ("embed", "output")
    return found | {"embedder/audio_input_projection/w": ("output", "embed")}


def sound_encoder(
    tree: Params,
    architecture: Architecture,
    features: Float[np.ndarray, "frames mel"],
    mask: Bool[Array, " frames"] | None = None,
) -> Encoder:
    """The steps from one clip to its soft tokens [tokens embed] in float32, one for four frames.

    `features` and `mask` are transformers' `input_features` and `input_features_mask` of the clip.
    Frames that the mask leaves out stand at the end, and nothing before them sees them, so they are
    dropped. Raises SourceError where the model has no audio tower or the tree lacks an array of it.
    """
    audio = _audio_of(architecture)
    feature = leaves(tree, ("audio_encoder", "feature"), _FEATURE)
    names = [*_LAYER, *(bounds_of(_LINEARS) if audio.clipped else ())]
    layers = [
        leaves(tree, ("audio_encoder", f"conformer/stacked_layers_{index}"), names)
        for index in range(audio.layers)
    ]
    output = leaves(tree, ("audio_encoder", "output_projection"), ("kernel", "bias"))
    projection = leaf(tree, "embedder", "audio_input_projection", "w")
    frames = np.asarray(_without_padding(features, mask), np.float32)

    def first(_: None, given: Made | None) -> tuple[jax.Array, Made]:
        tap = taps(given)
        return noted(tap("subsampled frames", subsample(feature, frames)), tap, given)

    return [
        first,
        *(partial(layer, params) for params in layers),
        partial(soft_tokens, output, projection),
    ]


def _audio_of(architecture: Architecture) -> AudioArchitecture:
    if architecture.audio is None:
        raise SourceError("The model has no audio tower according to its config.json.")
    return architecture.audio


def _without_padding(
    features: Float[np.ndarray, "frames mel"], mask: Bool[Array, " frames"] | None
) -> Float[np.ndarray, "real mel"]:
    if mask is None:
        return features
    real = np.asarray(mask, bool)
    frames = int(real.sum())
    if not real[:frames].all():
        raise ValueError("the frames that the mask leaves out must stand at the end")
    return features[:frames]


@jax.jit
def subsample(params: Leaves, features: Float[Array, "frames mel"]) -> Float[Array, "tokens embed"]:
    """A quarter of the frames, each over a quarter of the bands [tokens embed].

    Two convolutions of stride two over time and frequency, each with a layer norm over channels.
    """
    x = features[None, :, :, None]
    for stage in range(2):
        kernel = params[f"subsampling_{stage}/kernel"]
        x = jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(_layer_norm(x, params[f"norm_{stage}/scale"]))
    return replicated(product("tfc,fce->te", x[0], params["input_proj/kernel"]))


def _layer_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + _EPSILON) * scale.astype(x.dtype)


@jax.jit
def layer(
    params: Leaves, hidden: Float[Array, "tokens embed"], given: Made | None
) -> tuple[Float[Array, "tokens embed"], Made]:
    """The conformer layer's output [tokens embed]; `params` are its arrays by their paths."""
    tap = taps(given)
    hidden = tap("first feed-forward", feed_forward(params, "fflayer_start", hidden))
    normed = _norm(params, "trans_atten/pre_norm", _clamp(hidden))
    attended = attention(params, tap("norm before attention", normed), tap)
    attended = _norm(params, "trans_atten/post_norm", _clamp(attended))
    hidden = tap("sum behind attention", hidden + tap("norm behind attention", attended))
    hidden = tap("light convolution", light_convolution(params, hidden))
    hidden = tap("second feed-forward", feed_forward(params, "fflayer_end", hidden))
    out = replicated(_norm(params, "final_ln", _clamp(hidden)))
    return noted(tap("output", out), tap, given)


def feed_forward(
    params: Leaves, end: str, hidden: Float[Array, "tokens embed"]
) -> Float[Array, "tokens embed"]:
    """`hidden` plus half of one of a layer's two feed-forwards [tokens embed]."""
    normed = _norm(params, f"{end}/pre_layer_norm", _clamp(hidden))
    inner = jax.nn.silu(clipped("te,em->tm", normed, params, f"{end}/ffn_layer1", "kernel"))
    fed = clipped("tm,me->te", inner, params, f"{end}/ffn_layer2", "kernel")
    return hidden + _norm(params, f"{end}/post_layer_norm", _clamp(fed)) * _RESIDUAL_WEIGHT


def attention(
    params: Leaves, hidden: Float[Array, "tokens embed"], tap: Taps[jax.Array]
) -> Float[Array, "tokens embed"]:
    """Attention over each frame and the ones before it [tokens embed].

    To each query's product with a key is added its product with the projected sine waves of their
    distance, after Transformer-XL; the sum is soft-capped.
    """
    place = "trans_atten/self_atten"
    waves = params[_WAVES]
    tokens, heads, head_dim = len(hidden), waves.shape[1], waves.shape[2]
    query, key, value = (
        clipped("te,ed->td", hidden, params, f"{place}/{name}", "kernel").reshape(
            tokens, heads, head_dim
        )
        for name in ("query", "key", "value")
    )
    query, key, value = tap("queries", query), tap("keys", key), tap("values", value)
    sharpness = jax.nn.softplus(params[f"{place}/per_dim_scale"].astype(jnp.float32))
    query = query * np.float32(head_dim**-0.5 / log(2)) * sharpness
    key = key * np.float32(log(1 + e) / log(2))
    frame = np.arange(tokens)[:, None] - np.arange(WINDOW)
    seen = np.maximum(frame, 0)
    by_distance = product("de,ehi->dhi", distance_waves(hidden.shape[-1]), waves)
    scores = product("qhd,qwhd->hqw", query, key[seen]) + product(
        "qhd,whd->hqw", query, by_distance
    )
    scores = jnp.where(frame >= 0, jnp.tanh(scores / _LOGIT_CAP) * _LOGIT_CAP, -jnp.inf)
    mixed = product("hqw,qwhd->qhd", jax.nn.softmax(scores, axis=-1), value[seen])
    out = clipped("qhd,hde->qe", tap("attention", mixed), params, "trans_atten/post", "kernel")
    return tap("output projection", out)


def distance_waves(embed: int) -> Float[Array, "window embed"]:
    """Sine and cosine of the distances 0 … WINDOW - 1 at embed / 2 frequencies [window embed]."""
    waves = embed // 2
    steps = np.arange(waves, dtype=np.float32) * np.float32(-log(_LONGEST_WAVE) / max(waves - 1, 1))
    angle = np.arange(WINDOW, dtype=np.float32)[:, None] * np.exp(steps)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def light_convolution(
    params: Leaves, hidden: Float[Array, "tokens embed"]
) -> Float[Array, "tokens embed"]:
    """`hidden` plus a gated convolution over each channel's past [tokens embed]."""
    normed = _norm(params, "lconv/ln", hidden)
    started = clipped("te,ed->td", normed, params, "lconv/linear_start", "kernel")
    signal, gate = jnp.split(started, 2, axis=-1)
    kernel = params["lconv/depthwise_conv1d/kernel"]
    convolved = jax.lax.conv_general_dilated(
        (signal * jax.nn.sigmoid(gate))[None],
        kernel.astype(hidden.dtype),
        window_strides=(1,),
        padding=((len(kernel) - 1, 0),),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=hidden.shape[-1],
        precision=jax.lax.Precision.HIGHEST,
    )[0]
    inner = jax.nn.silu(_norm(params, "lconv/conv_norm", _clamp(convolved)))
    return hidden + clipped("te,ed->td", inner, params, "lconv/linear_end", "kernel")


@jax.jit
def soft_tokens(
    output: Leaves,
    projection: Float[Array, "output text"],
    hidden: Float[Array, "tokens embed"],
    given: Made | None,
) -> tuple[Float[Array, "tokens text"], Made]:
    """The clip's soft tokens in the text model's space [tokens text]."""
    tap = taps(given)
    bias = output["bias"].astype(hidden.dtype)
    frames = tap("projected frames", product("te,eo->to", hidden, output["kernel"]) + bias)
    normed = tap("norm before the projection", rms_norm(frames, None, _EPSILON))
    found = replicated(product("to,od->td", normed, projection))
    return noted(tap("soft tokens", found), tap, given)


def _norm(params: Leaves, name: str, x: jax.Array) -> jax.Array:
    return rms_norm(x, params[f"{name}/scale"], _EPSILON)


def _clamp(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -_LARGEST, _LARGEST)
