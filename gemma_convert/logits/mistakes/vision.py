"""Mistakes in the vision tower: around its layers, and in how its attention turns and what it sees.

Modules: `Gemma4VisionModel` in `transformers/models/gemma4/modeling_gemma4.py` (5.23). Its layers
have the modules of a decoder layer, where linear ones may clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gemma_convert.forward.parts import Part
from gemma_convert.logits.mistakes.attention import paired_neighbours
from gemma_convert.logits.mistakes.kernels import (
    WEIGHTS,
    matrix_edits,
    of_epsilon,
    of_kernel,
    of_kernels,
    of_norm,
)
from gemma_convert.logits.mistakes.trial import Edit, Subject, Trial, identity
from gemma_convert.logits.tapped import MADE_BY

if TYPE_CHECKING:
    import torch

_BASES = (10.0, 100.0, 1e3, 1e4, 1e6)
_PATCHES = "vision_tower.patch_embedder"
_POOLER = "vision_tower.pooler"


def of_layer(subject: Subject, part: Part, exact: Mapping[Part, Any]) -> Iterator[Trial]:
    """In a part of a layer, whose parts rightly make `exact`."""
    if part == "attention":
        yield from _of_attention(subject)
    elif part in WEIGHTS:
        yield from of_kernels(subject, part)
    elif part in MADE_BY and part != "output":
        yield from of_norm(subject, MADE_BY[part])


def of_ends(subject: Subject, part: Part, exact: Mapping[Part, Any]) -> Iterator[Trial]:
    """In a part before or behind the layers; the subject is the model, called by its arguments."""
    if part == "patch embedding":
        yield from _of_patches(subject)
    elif part == "pooled patches":
        yield from _of_pooling(subject)
    elif part == "standardized patches":
        yield from _of_standardization(subject)
    else:
        yield from of_projection(subject, part, "embed_vision")


def of_projection(subject: Subject, part: Part, path: str) -> Iterator[Trial]:
    """In the norm or the kernel of the way into the text model, which is at `path`."""
    if part == "norm before the projection":
        norm = f"{path}.embedding_pre_projection_norm"
        yield Trial("the norm is lost", {f"{norm}.forward": identity})
        yield from of_epsilon(subject, norm)
    else:
        kernel = f"{path}.embedding_projection"
        yield from of_kernel(subject, kernel, "the projection's kernel", matrix_edits())


def _of_attention(subject: Subject) -> Iterator[Trial]:
    import torch

    attention = subject.layer.self_attn
    mask = subject.named.get("attention_mask")
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask == 0
        least = False if mask.dtype == torch.bool else mask.min()
        everything = torch.ones_like(mask) if mask.dtype == torch.bool else mask * 0
        yield Trial("padding patches are seen", called={"attention_mask": everything})
        inverted = torch.where(seen, least, everything)
        yield Trial("its mask is inverted", called={"attention_mask": inverted})
    cosine, sine = subject.named["position_embeddings"]
    half = cosine.shape[-1] // 2

    def trial(words: str, cosine: torch.Tensor, sine: torch.Tensor) -> Trial:
        return Trial(words, called={"position_embeddings": (cosine, sine)})

    yield trial("x and y of positions are exchanged", cosine.roll(half, -1), sine.roll(half, -1))
    yield trial("its rotary embedding turns the other way", cosine, -sine)
    yield trial("its rotary embedding is lost", cosine * 0 + 1, sine * 0)
    words = "its rotary embedding pairs neighbours instead of halves"
    yield Trial(words, functions={"apply_rotary_pos_emb": paired_neighbours})
    yield Trial(
        "its rotary embedding pairs the halves of the whole head",
        functions={"apply_multidimensional_rope": _paired_whole},
    )
    positions = subject.named["position_ids"]
    for base in _BASES:
        if base != attention.config.rope_parameters["rope_theta"]:
            yield trial(f"its rotary base is {base:,.0f}", *_turned(positions, half, base))
    root = attention.head_dim**-0.5
    yield Trial("scores are divided by the root of head_dim", {"self_attn.scaling": root})


def _turned(positions: torch.Tensor, half: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of all angles [1 patches head_dim], one half of which is of x, one of y."""
    import torch

    exponent = torch.arange(0, half, 2, device=positions.device).float() / half
    angle = positions[..., None].float() / base**exponent
    x, y = angle[:, :, 0], angle[:, :, 1]
    angles = torch.cat([x, x, y, y], dim=-1)
    return angles.cos(), angles.sin()


def _paired_whole(states: Any, cosine: Any, sine: Any, _: Any, unsqueeze_dim: int = 2) -> Any:
    """Rotary embedding of the pairs (i, i + head_dim / 2), where each axis has pairs of its own."""
    import torch

    first, second = states.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return states * cosine.unsqueeze(unsqueeze_dim) + turned * sine.unsqueeze(unsqueeze_dim)


def _of_patches(subject: Subject) -> Iterator[Trial]:
    table = f"{_PATCHES}.position_embedding_table"
    places, pixels = subject.weight(table), subject.named["pixel_values"]
    if places is not None:
        yield Trial("x and y of positions are exchanged", {table: places.flip(0)})
        for count in (1, -1):
            yield Trial("its positions are shifted by one", {table: places.roll(count, 1)})
        yield Trial("its positions are lost", {table: places * 0})
        for axis, name in enumerate("xy"):
            both = places[axis].expand_as(places)
            yield Trial(f"both of its positions are those of {name}", {table: both})
    side = subject.layer.get_submodule(_PATCHES).patch_size
    yield from of_kernel(subject, f"{_PATCHES}.input_proj", "the patches' kernel", _edits(side))
    yield Trial("pixels are not centred", called={"pixel_values": pixels / 2 + 0.5})
    yield Trial("pixels are of 0 to 255", called={"pixel_values": pixels * 255})


def _edits(side: int) -> Iterator[tuple[str, Edit]]:
    """Of the kernel of patches [out (side side channels)]."""

    def of_pixels(
        edit: Edit,
    ) -> Edit:
        def edited(values: torch.Tensor) -> torch.Tensor:
            pixels = values.unflatten(1, (side, side, -1))
            return edit(pixels).reshape(values.shape)

        return edited

    yield "its colours are in reverse order", of_pixels(lambda pixels: pixels.flip(3))
    yield "its rows and columns are exchanged", of_pixels(lambda pixels: pixels.swapaxes(1, 2))
    words = "its colours are taken to be its first axis"
    yield words, of_pixels(lambda pixels: pixels.permute(0, 3, 1, 2))
    yield words, lambda values: values.unflatten(1, (-1, side * side)).swapaxes(1, 2).flatten(1)
    yield "its inputs are in reverse order", lambda values: values.flip(1)
    yield from matrix_edits()
    yield "it is zero", lambda values: values * 0


def _of_pooling(subject: Subject) -> Iterator[Trial]:
    pooler = subject.layer.get_submodule(_POOLER)
    root = pooler.root_hidden_size
    for words, factor in (
        ("it is not multiplied by √embed", 1.0),
        ("it is multiplied by √embed twice", root * root),
        ("it is divided by √embed", 1 / root),
    ):
        yield Trial(words, {f"{_POOLER}.root_hidden_size": factor})
    positions = subject.named["image_position_ids"]
    crossed = {"image_position_ids": positions.flip(-1)}
    yield Trial("x and y of positions are exchanged", called=crossed)
    yield Trial(
        "patches are pooled in the order in which they stand, not by squares",
        {f"{_POOLER}._avg_pool_by_positions": _pooled_in_order},
    )


def _pooled_in_order(states: Any, positions: Any, length: int) -> tuple[Any, Any]:
    """Means of patches [1 patches embed] that stand together, and which of them are of any."""
    means = states.unflatten(1, (length, -1)).mean(dim=2)
    real = (positions != -1).any(dim=-1).sum(dim=-1)
    places = means.new_ones(means.shape[:2]).cumsum(dim=-1)
    return means, places <= real * length // states.shape[1]


def _of_standardization(subject: Subject) -> Iterator[Trial]:
    scale, bias = (subject.layer.vision_tower.get_buffer(f"std_{one}") for one in ("scale", "bias"))

    def trial(words: str, **changed: torch.Tensor) -> Trial:
        return Trial(words, {f"vision_tower.std_{name}": one for name, one in changed.items()})

    yield trial("it is lost", scale=scale * 0 + 1, bias=bias * 0)
    yield trial("its scale is lost", scale=scale * 0 + 1)
    yield trial("its bias is lost", bias=bias * 0)
    yield trial("scale and bias are exchanged", scale=bias, bias=scale)
    yield trial("its scale is divided by", scale=1 / scale)
    yield trial("its bias is added", bias=-bias)
    yield trial("its bias is subtracted behind the scale", bias=bias / scale)
    yield trial("its scale is too large by one", scale=scale + 1)
    yield trial("its scale is too small by one", scale=scale - 1)
