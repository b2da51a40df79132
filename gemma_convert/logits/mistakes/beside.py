"""The mistakes that are made beside the modules, each as what comes of it, [length features].

Embedding, per-layer inputs (`project_per_layer_inputs`) and final norm are as in
`transformers/models/gemma4/modeling_gemma4.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.parts import Part

Array = npt.NDArray[Any]


def of_embedding(embedded: Array, rows: Callable[[int], Array]) -> Iterator[tuple[str, Array]]:
    """`embedded` is right [length embed]; `rows` gives those of ids so many further on, scaled."""
    root = float(np.sqrt(embedded.shape[-1]))
    yield "it is not multiplied by √embed", embedded / root
    yield "it is multiplied by √embed twice", embedded * root
    yield "its rows are shifted by one", rows(1)
    yield "its rows are shifted by one", rows(-1)


def of_per_layer_inputs(token: Array, context: Array, scale: Array) -> Iterator[tuple[str, Array]]:
    """`token` and `context` are what the sum is of [length layers ple], `scale` the norm's [ple].

    The sum is divided by the root of two.
    """

    def both(token: Array, context: Array) -> Array:
        total: Array = (token + context) / np.sqrt(2.0)
        return total.reshape(len(token), -1)

    layers, ple = token.shape[1:]
    for count in (1, -1):
        yield "its embedding is shifted by a layer", both(np.roll(token, count, 1), context)
        yield "its projection is shifted by a layer", both(token, np.roll(context, count, 1))
        yield (
            "embedding and projection are shifted by a layer",
            both(np.roll(token, count, 1), np.roll(context, count, 1)),
        )
    for shape in ((layers, ple), (ple, layers)):
        words = "layers and ple are exchanged"
        yield f"of its embedding, {words}", both(_crossed(token, shape), context)
        if scale.size and (scale == scale[0]).all():
            yield f"of its projection, {words}", both(token, _crossed(context, shape))
    root = np.sqrt(float(ple))
    yield "its embedding is not multiplied by √ple", both(token / root, context)
    yield "its embedding is multiplied by √ple twice", both(token * root, context)
    yield "its norm has no weight", both(token, context / scale)
    yield "its norm's weight is too large by one", both(token, context / scale * (scale + 1))
    yield "its norm's weight is too small by one", both(token, context / scale * (scale - 1))
    yield "its embedding is lost", both(token * 0, context)
    yield "its projection is lost", both(token, context * 0)
    yield "it is not divided by √2", both(token, context) * np.sqrt(2.0)


def of_final_norm(normed: Array, scale: Array) -> Iterator[tuple[str, Array]]:
    """`normed` is right [length embed], of the weight `scale` [embed]."""
    yield "its weight is lost", normed / scale
    yield "its weight is too large by one", normed / scale * (scale + 1)
    yield "its weight is too small by one", normed / scale * (scale - 1)
    yield "its weight is applied twice", normed * scale


def of_logits(logits: Array, cap: float | None, embed: int) -> Iterator[tuple[str, Array]]:
    """`logits` [positions width] are right before the cap, for neighbouring tokens."""

    def capped(values: Array) -> Array:
        return values if cap is None else np.tanh(values / cap) * cap

    root = float(np.sqrt(embed))
    yield "the soft-cap is lost", logits
    yield "the table is multiplied by √embed", capped(logits * root)
    yield "the table is divided by √embed", capped(logits / root)
    yield "the table is divided by √embed twice", capped(logits / embed)
    yield "the rows of the table are shifted by one", capped(np.roll(logits, 1, 1))
    yield "the rows of the table are shifted by one", capped(np.roll(logits, -1, 1))


def of_sum(part: Part, state: Array, exact: Mapping[Part, Array]) -> Iterator[tuple[str, Array]]:
    """`state` leads to the layer, and its parts rightly make `exact`, [length features] each."""
    if part == "sum behind attention":
        added = exact["norm behind attention"]
        yield "the residual is lost", added
        yield "the residual is taken behind the norm", exact["norm before attention"] + added
        yield "attention is lost", state
    if part == "sum of both branches":
        yield "the dense branch is lost", exact["norm behind the experts"]
        yield "the experts are lost", exact["norm behind the dense MLP"]
    if part == "sum behind the MLP":
        added = exact["norm behind the MLP"]
        yield "the residual is lost", added
        yield "the residual is taken behind the norm", exact["norm before the MLP"] + added


def _crossed(values: Array, shape: tuple[int, int]) -> Array:
    """(ple layers) taken for (layers ple) in a table's last axis, or the reverse."""
    flat = values.reshape(len(values), *shape)
    return flat.swapaxes(1, 2).reshape(values.shape)
