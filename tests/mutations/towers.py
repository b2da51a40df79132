"""Mistakes in the weights of towers: the parts that fail by each, and what is said of them.

They are planted many at once, no two in one part: each part is given the original's own states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from weights import (
    Mistake,
    Tensors,
    change,
    exchange,
    halves_exchanged,
    ones,
    regroup,
    rolled,
    times,
    transposed_block,
    transposed_by_shape,
    zeros,
)

Edit = Callable[[np.ndarray], np.ndarray]
VISION, AUDIO = "model.vision_tower.", "model.audio_tower."
HEADS = 7
"""Of the tiny vision tower; the audio tower has four."""


@dataclass(frozen=True)
class Planted:
    """A mistake: what plants it, and a pattern of what is said of each part that then fails."""

    name: str
    plant: Mistake
    said: Mapping[str, str | None]


def batches(mistakes: Iterable[Planted]) -> list[list[Planted]]:
    """All of them in as few checkpoints as have no two mistakes in one part."""
    found: list[list[Planted]] = []
    for one in mistakes:
        free = (each for each in found if not any(one.said.keys() & other.said for other in each))
        batch = next(free, None)
        if batch is None:
            found.append(batch := [])
        batch.append(one)
    return found


def _edited(tower: str, layer: int, part: str, path: str, edits: Mapping[str, Edit]) -> Iterator:
    """One mistake for each pattern, in layers that follow one another."""
    base, layers = (f"{VISION}encoder.", 3) if tower == "vision" else (AUDIO, 2)
    for number, (said, edit) in enumerate(edits.items(), layer):
        where = number % layers
        plant = change(f"{base}layers.{where}.{path}", edit)
        yield Planted(f"{tower}: {path}: {said}", plant, {f"{tower} layer {where}, {part}": said})


def _around(tower: str, part: str, path: str, edits: Mapping[str, Edit]) -> Iterator[Planted]:
    for said, edit in edits.items():
        yield Planted(
            f"{tower}: {path}: {said}", change(path, edit), {f"{tower}, the {part}": said}
        )


def shifted(amount: float) -> Edit:
    return lambda values: values.astype(np.float32) + amount


def lost(bound: float) -> Edit:
    return lambda values: np.full_like(values, bound)


def _halves_interleaved(heads: int) -> Edit:
    """The halves of each head of a kernel [(heads head_dim) in]."""

    def edit(values: np.ndarray) -> np.ndarray:
        halves = values.reshape(heads, 2, -1, values.shape[1])
        return halves.swapaxes(1, 2).reshape(values.shape)

    return edit


def vision() -> Iterator[Planted]:
    """Mistakes in any vision tower, without those in clip bounds."""
    kernels = {
        "queries": ("self_attn.q_proj.linear.weight", "query"),
        "keys": ("self_attn.k_proj.linear.weight", "key"),
        "values": ("self_attn.v_proj.linear.weight", "value"),
    }
    for start, (part, (path, name)) in enumerate(kernels.items()):
        edits = {
            f"{name} kernel: its heads and head_dim are exchanged": regroup(HEADS),
            f"{name} kernel: its heads are shifted by one": rolled(0, 8),
            f"{name} kernel: a square block of it is transposed": transposed_block,
            f"{name} kernel: it is read in the shape of its transpose": transposed_by_shape,
            f"{name} kernel: the halves of its rotary dimension are inter": _halves_interleaved(
                HEADS
            ),
            f"{name} kernel: its inputs are shifted by one": rolled(1),
        }
        yield from _edited("vision", start, part, path, edits)
    yield from _edited(
        "vision",
        0,
        "output projection",
        "self_attn.o_proj.linear.weight",
        {
            "output kernel: its heads and head_dim are exchanged": regroup(HEADS, 1),
            "output kernel: a square block of it is transposed": transposed_block,
            "output kernel: it is zero|all of its values are zero": zeros,
            "it is 2 times what it should be": times(2),
        },
    )
    for start, (norm, part) in enumerate(
        {
            "self_attn.q_norm": "queries",
            "self_attn.k_norm": "keys",
            "input_layernorm": "norm before attention",
            "post_attention_layernorm": "norm behind attention",
            "pre_feedforward_layernorm": "norm before the MLP",
            "post_feedforward_layernorm": "norm behind the MLP",
        }.items()
    ):
        edits = {
            "its weight is lost": ones,
            "its weight is too large by one": shifted(1),
            "its weight is too small by one": shifted(-1),
        }
        yield from _edited("vision", start, part, f"{norm}.weight", edits)
    mlp = "mlp.{}_proj.linear.weight"
    yield from _edited(
        "vision",
        0,
        "dense MLP",
        mlp.format("down"),
        {
            "down kernel: it is read in the shape of its transpose": transposed_by_shape,
            "gate, up or down is zero|all of its values are zero": zeros,
            r"it differs in 1 of 60 features": _one_row,
        },
    )
    yield from _edited(
        "vision",
        1,
        "dense MLP",
        mlp.format("up"),
        {"up kernel: its outputs are shifted by one": rolled(0)},
    )
    yield from _exchanges()
    yield from _around(
        "vision",
        "patch embedding",
        f"{VISION}patch_embedder.position_embedding_table",
        {
            "x and y of positions are exchanged": lambda v: v[::-1],
            "its positions are shifted by one": rolled(1),
            "its positions are lost": zeros,
            "both of its positions are those of x": lambda v: np.stack([v[0], v[0]]),
        },
    )
    yield from _around(
        "vision",
        "patch embedding",
        f"{VISION}patch_embedder.input_proj.weight",
        {
            "its rows and columns are exchanged": pixels(lambda v: v.swapaxes(1, 2)),
            "its colours are in reverse order": pixels(lambda v: v[..., ::-1]),
            "its colours are taken to be its first axis": pixels(lambda v: np.moveaxis(v, 3, 1)),
            "it is read in the shape of its transpose": transposed_by_shape,
        },
    )
    yield from _around(
        "vision",
        "soft tokens",
        "model.embed_vision.embedding_projection.weight",
        {
            "projection's kernel: it is read in the shape of its transpose": transposed_by_shape,
            "projection's kernel: its outputs are shifted by one": rolled(0),
        },
    )


def _one_row(values: np.ndarray) -> np.ndarray:
    values[7] *= 3
    return values


def pixels(edit: Edit) -> Edit:
    """An edit of the kernel of patches as [out rows columns colours]."""
    return lambda v: np.ascontiguousarray(edit(v.reshape(len(v), 4, 4, 3))).reshape(v.shape)


def unknown() -> Iterator[Planted]:
    """Mistakes that nobody makes, of which nothing is to be said."""
    random = np.random.default_rng(0)
    for part, path in {
        "queries": "encoder.layers.0.self_attn.q_proj.linear.weight",
        "norm behind attention": "encoder.layers.0.post_attention_layernorm.weight",
        "dense MLP": "encoder.layers.0.mlp.gate_proj.linear.weight",
    }.items():
        plant = change(VISION + path, lambda v: random.permutation(v.ravel()).reshape(v.shape))
        yield Planted(f"vision: {part} in disorder", plant, {f"vision layer 0, {part}": None})
    for part, path in {
        "the patch embedding": "patch_embedder.input_proj.weight",
        "the standardized patches": "std_bias",
    }.items():
        plant = change(VISION + path, lambda v: random.permutation(v.ravel()).reshape(v.shape))
        yield Planted(f"{part} in disorder", plant, {f"vision, {part}": None})


def _exchanges() -> Iterator[Planted]:
    """Two kernels of a layer of the vision tower, or of two of its layers."""
    layer = f"{VISION}encoder.layers."
    for where, pair, parts, said in (
        (0, "k_proj v_proj", ("keys", "values"), "keys and values are exchanged"),
        (1, "q_proj k_proj", ("queries", "keys"), "queries and keys are exchanged"),
        (2, "q_proj v_proj", ("queries", "values"), "queries and values are exchanged"),
    ):
        one, other = (f"{layer}{where}.self_attn.{name}.linear.weight" for name in pair.split())
        names = [f"vision layer {where}, {part}" for part in parts]
        yield Planted(f"vision: {said}", exchange(one, other), dict.fromkeys(names, said))
    gate, up = (f"{layer}2.mlp.{name}_proj.linear.weight" for name in ("gate", "up"))
    yield Planted(
        "vision: gate and up exchanged",
        exchange(gate, up),
        {"vision layer 2, dense MLP": "gate and up are exchanged"},
    )
    for path, part, name in (
        ("self_attn.q_proj.linear.weight", "queries", "the query kernel is"),
        ("self_attn.o_proj.linear.weight", "output projection", "the output kernel is"),
        ("post_attention_layernorm.weight", "norm behind attention", "its weight is"),
    ):
        yield Planted(
            f"vision: {part} of the neighbouring layer",
            exchange(f"{layer}0.{path}", f"{layer}1.{path}"),
            {
                f"vision layer {here}, {part}": f"{name} that of layer {there}"
                for here, there in ((0, 1), (1, 0))
            },
        )


def standardization() -> Iterator[Planted]:
    """Mistakes in a vision tower that standardises what it pools."""
    part = "standardized patches"
    yield from _around(
        "vision",
        part,
        f"{VISION}std_scale",
        {
            "its scale is lost": ones,
            "its scale is divided by": lambda v: 1 / v.astype(np.float32),
        },
    )
    yield from _around(
        "vision",
        part,
        f"{VISION}std_bias",
        {"its bias is lost": zeros, "its bias is added": lambda v: -v},
    )
    yield Planted(
        "vision: scale and bias exchanged",
        exchange(f"{VISION}std_scale", f"{VISION}std_bias"),
        {f"vision, the {part}": "scale and bias are exchanged"},
    )


def bounds() -> Iterator[Planted]:
    """Mistakes in clip bounds, E2B's; sounds are so loud that those of the audio tower are met."""
    yield from _edited(
        "vision",
        0,
        "dense MLP",
        "mlp.down_proj.input_max",
        {"down kernel: the upper bound of its inputs is lost": lost(np.inf)},
    )
    vision_layer = f"{VISION}encoder.layers."
    yield Planted(
        "vision: lower bound for upper",
        exchange(
            f"{vision_layer}1.self_attn.o_proj.output_min",
            f"{vision_layer}1.self_attn.o_proj.output_max",
        ),
        {"vision layer 1, output projection": "lower and upper bound of its outputs are exch"},
    )
    yield Planted(
        "vision: bounds of inputs for those of outputs",
        _bounds_exchanged(f"{vision_layer}2.self_attn.q_proj"),
        {"vision layer 2, queries": "the bounds of its inputs and of its outputs are exchanged"},
    )
    yield from _edited(
        "audio",
        0,
        "first feed-forward",
        "feed_forward1.ffw_layer_1.input_min",
        {
            "first kernel of the first feed-forward: the lower bound of its inputs is l": lost(
                -np.inf
            )
        },
    )
    yield Planted(
        "audio: lower bound for upper",
        exchange(
            f"{AUDIO}layers.1.self_attn.post.input_min", f"{AUDIO}layers.1.self_attn.post.input_max"
        ),
        {"audio layer 1, output projection": "lower and upper bound of its inputs are exch"},
    )


def _bounds_exchanged(path: str) -> Mistake:
    def plant(tensors: Tensors) -> None:
        for end in ("min", "max"):
            exchange(f"{path}.input_{end}", f"{path}.output_{end}")(tensors)

    return plant


def audio() -> Iterator[Planted]:
    """Mistakes in the audio tower, without those in clip bounds."""
    for start, (part, path, name) in enumerate(
        (
            ("queries", "self_attn.q_proj", "query"),
            ("keys", "self_attn.k_proj", "key"),
            ("values", "self_attn.v_proj", "value"),
            ("output projection", "self_attn.post", "output"),
        )
    ):
        axis = int(name == "output")
        edits = {
            f"{name} kernel: its heads and head_dim are exchanged": regroup(4, axis),
            f"{name} kernel: a square block of it is transposed|shape of its transpose": (
                transposed_by_shape
            ),
        }
        yield from _edited("audio", start, part, f"{path}.linear.weight", edits)
    yield from _edited(
        "audio",
        0,
        "attention",
        "self_attn.relative_k_proj.weight",
        {
            "positions' kernel: its heads and head_dim are exchanged": regroup(4),
            "positions' kernel: it is read in the shape of its tr": transposed_by_shape,
        },
    )
    yield from _edited(
        "audio",
        1,
        "attention",
        "self_attn.per_dim_scale",
        {"the scale of each feature is lost": zeros},
    )
    for start, (norm, part) in enumerate(
        {
            "norm_pre_attn": "norm before attention",
            "norm_post_attn": "norm behind attention",
            "norm_out": "output",
            "lconv1d.pre_layer_norm": "light convolution",
            "lconv1d.conv_norm": "light convolution",
            "feed_forward1.pre_layer_norm": "first feed-forward",
            "feed_forward2.post_layer_norm": "second feed-forward",
        }.items()
    ):
        edits = {"its weight is lost": ones, "its weight is too small by one": shifted(-1)}
        yield from _edited("audio", start, part, f"{norm}.weight", edits)
    taps = "lconv1d.depthwise_conv1d.weight"
    yield from _edited(
        "audio",
        0,
        "light convolution",
        taps,
        {
            "its taps are in reverse order": lambda v: v[..., ::-1],
            "its taps are shifted by one": rolled(2),
        },
    )
    yield from _edited(
        "audio",
        1,
        "light convolution",
        "lconv1d.linear_start.linear.weight",
        {"signal and gate are exchanged": lambda v: halves_exchanged(v.T).T},
    )
    layer = f"{AUDIO}layers."
    yield Planted(
        "audio: the two feed-forwards exchanged",
        exchange(
            f"{layer}1.feed_forward1.ffw_layer_1.linear.weight",
            f"{layer}1.feed_forward2.ffw_layer_1.linear.weight",
        ),
        {
            "audio layer 1, first feed-forward": "first kernel is that of the second feed-forward",
            "audio layer 1, second feed-forward": "first kernel is that of the first feed-forward",
        },
    )
    yield Planted(
        "audio: keys and values exchanged",
        exchange(
            f"{layer}1.self_attn.k_proj.linear.weight", f"{layer}1.self_attn.v_proj.linear.weight"
        ),
        dict.fromkeys(
            ("audio layer 1, keys", "audio layer 1, values"), "keys and values are exchanged"
        ),
    )
    yield Planted(
        "audio: a kernel of the neighbouring layer",
        exchange(
            f"{layer}0.lconv1d.linear_end.linear.weight",
            f"{layer}1.lconv1d.linear_end.linear.weight",
        ),
        {
            "audio layer 0, light convolution": "kernel behind the convolution is that of layer 1",
            "audio layer 1, light convolution": "kernel behind the convolution is that of layer 0",
        },
    )
    frames = f"{AUDIO}subsample_conv_projection."
    for number, ordinal in ((0, "first"), (1, "second")):
        yield from _around(
            "audio",
            "subsampled frames",
            f"{frames}layer{number}.conv.weight",
            {
                f"{ordinal} convolution's kernel: time and bands are": lambda v: v.swapaxes(2, 3),
                f"{ordinal} convolution's kernel: its taps are in reverse order": (
                    lambda v: v[:, :, ::-1, ::-1]
                ),
            },
        )
        yield from _around(
            "audio",
            "subsampled frames",
            f"{frames}layer{number}.norm.weight",
            {f"{ordinal} convolution's norm: its weight is lost": ones},
        )
    yield from _around(
        "audio",
        "subsampled frames",
        f"{frames}input_proj_linear.weight",
        {"its bands and channels are exchanged": regroup(11, 1)},
    )
    yield from _around(
        "audio",
        "projected frames",
        f"{AUDIO}output_proj.weight",
        {"its kernel: it is read in the shape of its tr": transposed_by_shape},
    )
    yield from _around(
        "audio", "projected frames", f"{AUDIO}output_proj.bias", {"its bias is lost": zeros}
    )
    yield from _around(
        "audio",
        "soft tokens",
        "model.embed_audio.embedding_projection.weight",
        {"projection's kernel: it is read in the shape of its transpose": transposed_by_shape},
    )
