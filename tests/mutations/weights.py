"""Mistakes in weights: what a checkpoint holds when a converter has made one of them.

Each changes the tensors of a Hugging Face checkpoint in place, shapes and dtypes kept, so that the
conversion of the result is the checkpoint that the mistaken converter would have written, whatever
the layout. Axes as in mappings/huggingface.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Tensors = dict[str, np.ndarray]
Mistake = Callable[[Tensors], None]

TEXT = "model.language_model."
FIRST, SECOND = TEXT + "layers.0.", TEXT + "layers.1."
FULL = TEXT + "layers.5."
VISION = "model.vision_tower.encoder.layers.1."
AUDIO = "model.audio_tower.layers.1."


def exchange(one: str, other: str) -> Mistake:
    def plant(tensors: Tensors) -> None:
        assert tensors[one].shape == tensors[other].shape
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return plant


def change(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Mistake:
    def plant(tensors: Tensors) -> None:
        before = tensors[name]
        after = np.array(edit(before.copy()), before.dtype, order="C")
        assert after.shape == before.shape
        tensors[name] = after

    return plant


def regroup(outer: int, axis: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """(inner outer) taken for (outer inner) along `axis`."""

    def edit(values: np.ndarray) -> np.ndarray:
        front = np.moveaxis(values, axis, 0)
        rest = front.shape[1:]
        crossed = front.reshape(outer, -1, *rest).swapaxes(0, 1).reshape(front.shape)
        return np.moveaxis(crossed, 0, axis)

    return edit


def transposed_by_shape(values: np.ndarray) -> np.ndarray:
    """The transpose, read as if it had the shape of the original."""
    return values.T.reshape(values.shape)


def transposed_block(values: np.ndarray) -> np.ndarray:
    """A square matrix transposed: the largest square in the corner."""
    side = min(values.shape[-2:])
    values[..., :side, :side] = values[..., :side, :side].swapaxes(-1, -2).copy()
    return values


def halves_exchanged(values: np.ndarray) -> np.ndarray:
    first, second = np.split(values, 2, axis=1)
    return np.concatenate([second, first], axis=1)


def halves_interleaved(values: np.ndarray) -> np.ndarray:
    first, second = np.split(values, 2, axis=1)
    return np.stack([first, second], axis=2).reshape(values.shape)


def rolled(axis: int, count: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.roll(values, count, axis)


def ones(values: np.ndarray) -> np.ndarray:
    return np.ones_like(values)


def zeros(values: np.ndarray) -> np.ndarray:
    return np.zeros_like(values)


def times(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: values.astype(np.float32) * np.float32(factor)


def last_bit(values: np.ndarray) -> np.ndarray:
    values.reshape(-1).view(np.uint16)[-1] ^= 1
    return values


def sign_bit(values: np.ndarray) -> np.ndarray:
    values.reshape(-1).view(np.uint16)[7] ^= 0x8000
    return values


def one_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(values: np.ndarray) -> np.ndarray:
        values.reshape(-1)[7] = value
        return values

    return edit


def layers_exchanged(one: str, other: str) -> Mistake:
    def plant(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(one)]:
            exchange(name, other + name.removeprefix(one))(tensors)

    return plant


def layers_reordered(order: Callable[[int], int], count: int) -> Mistake:
    """Layer n holds what layer `order(n)` should, where both are of one kind."""

    def plant(tensors: Tensors) -> None:
        before = dict(tensors)
        for layer in range(count):
            here, there = f"{TEXT}layers.{layer}.", f"{TEXT}layers.{order(layer)}."
            for name in [name for name in before if name.startswith(here)]:
                other = there + name.removeprefix(here)
                if other in before and before[other].shape == before[name].shape:
                    tensors[name] = before[other]

    return plant


def common(heads: int, kv_heads: int, embed: int) -> Iterator[tuple[str, Mistake]]:
    """Mistakes that every model can suffer; layers 0 to 4 slide, layer 5 does not."""
    attention, root = FIRST + "self_attn.", float(np.sqrt(embed))
    yield (
        "q: (head_dim heads) for (heads head_dim)",
        change(attention + "q_proj.weight", regroup(heads)),
    )
    yield (
        "k: (head_dim kv_heads) for (kv_heads head_dim)",
        change(attention + "k_proj.weight", regroup(kv_heads)),
    )
    yield (
        "v: (head_dim kv_heads) for (kv_heads head_dim)",
        change(attention + "v_proj.weight", regroup(kv_heads)),
    )
    yield (
        "o: (head_dim heads) for (heads head_dim)",
        change(attention + "o_proj.weight", regroup(heads, 1)),
    )
    yield (
        "a key head taken for the next",
        change(attention + "k_proj.weight", lambda values: regroup(1)(np.roll(values, 16, 0))),
    )
    yield "K and V exchanged", exchange(attention + "k_proj.weight", attention + "v_proj.weight")
    yield (
        "q norm and k norm exchanged",
        exchange(attention + "q_norm.weight", attention + "k_norm.weight"),
    )
    yield (
        "down read in the shape of its transpose",
        change(FIRST + "mlp.down_proj.weight", transposed_by_shape),
    )
    yield "o: a square block transposed", change(attention + "o_proj.weight", transposed_block)
    yield (
        "gate and up exchanged",
        exchange(FIRST + "mlp.gate_proj.weight", FIRST + "mlp.up_proj.weight"),
    )
    yield "neighbouring layers exchanged", layers_exchanged(FIRST, SECOND)
    yield (
        "q of the neighbouring layer",
        exchange(attention + "q_proj.weight", SECOND + "self_attn.q_proj.weight"),
    )
    yield "layers of a scan out of order", layers_reordered(lambda n: n + 1 if n < 3 else n, 5)
    yield "a layer's scalar lost", change(FIRST + "layer_scalar", ones)
    yield "a layer's scalar zero", change(FIRST + "layer_scalar", zeros)
    yield (
        "norms around attention exchanged",
        exchange(FIRST + "input_layernorm.weight", FIRST + "post_attention_layernorm.weight"),
    )
    yield (
        "norms around the MLP exchanged",
        exchange(
            FIRST + "pre_feedforward_layernorm.weight", FIRST + "post_feedforward_layernorm.weight"
        ),
    )
    yield (
        "a norm's weight less one",
        change(FIRST + "input_layernorm.weight", lambda values: values.astype(np.float32) - 1),
    )
    yield "final norm lost", change(TEXT + "norm.weight", ones)
    yield (
        "embedding divided by its root again",
        change(TEXT + "embed_tokens.weight", times(1 / root)),
    )
    yield "embedding scaled twice", change(TEXT + "embed_tokens.weight", times(root))
    yield "vocabulary shifted by a row", change(TEXT + "embed_tokens.weight", rolled(0))
    yield "one bit of one value", change(TEXT + "norm.weight", last_bit)
    yield "one value NaN", change(FIRST + "mlp.up_proj.weight", one_value(float("nan")))
    yield "one value's sign", change(SECOND + "mlp.up_proj.weight", sign_bit)
    yield "a chunk of zeros", change(SECOND + "mlp.gate_proj.weight", zeros)


def mixture(experts: int) -> Iterator[tuple[str, Mistake]]:
    """Mistakes of 26B-A4B."""
    yield "experts rolled by one", change(FIRST + "experts.down_proj", rolled(0))
    yield "experts' gate and up exchanged", change(FIRST + "experts.gate_up_proj", halves_exchanged)
    yield (
        "experts' gate and up interleaved",
        change(FIRST + "experts.gate_up_proj", halves_interleaved),
    )
    yield (
        "experts read in the shape of their transpose",
        change(
            FIRST + "experts.down_proj",
            lambda values: values.swapaxes(1, 2).reshape(values.shape),
        ),
    )
    yield (
        "router read in the shape of its transpose",
        change(FIRST + "router.proj.weight", transposed_by_shape),
    )
    yield "router's experts reversed", change(FIRST + "router.proj.weight", lambda v: v[::-1])
    yield "router's scale lost", change(FIRST + "router.scale", ones)
    yield "scales of experts lost", change(FIRST + "router.per_expert_scale", ones)
    yield "scales of experts rolled", change(FIRST + "router.per_expert_scale", rolled(0))
    yield (
        "norms of the two branches exchanged",
        exchange(
            FIRST + "post_feedforward_layernorm_1.weight",
            FIRST + "post_feedforward_layernorm_2.weight",
        ),
    )
    yield "norm before the experts lost", change(FIRST + "pre_feedforward_layernorm_2.weight", ones)
    yield "key norm of a layer without values lost", change(FULL + "self_attn.k_norm.weight", ones)


def per_layer(layers: int) -> Iterator[tuple[str, Mistake]]:
    """Mistakes of E2B and E4B: per-layer embeddings."""
    table = TEXT + "embed_tokens_per_layer.weight"
    yield (
        "per-layer embeddings shifted by a layer",
        change(
            table,
            lambda values: np.roll(values.reshape(len(values), layers, -1), 1, 1).reshape(
                values.shape
            ),
        ),
    )
    yield "per-layer embeddings: (ple layers) for (layers ple)", change(table, regroup(layers, 1))
    yield (
        "their projection shifted by a layer",
        change(
            TEXT + "per_layer_model_projection.weight",
            lambda values: np.roll(values.reshape(layers, -1, values.shape[1]), 1, 0).reshape(
                values.shape
            ),
        ),
    )
    yield "their norm lost", change(TEXT + "per_layer_projection_norm.weight", ones)
    yield (
        "a layer's input gate of the next layer",
        exchange(FIRST + "per_layer_input_gate.weight", SECOND + "per_layer_input_gate.weight"),
    )
    yield (
        "norm behind the per-layer input lost",
        change(FIRST + "post_per_layer_input_norm.weight", ones),
    )


def vision(heads: int) -> Iterator[tuple[str, Mistake]]:
    """Mistakes in the vision tower of a model without clip bounds."""
    attention = VISION + "self_attn."
    yield (
        "vision: K and V exchanged",
        exchange(attention + "k_proj.linear.weight", attention + "v_proj.linear.weight"),
    )
    yield (
        "vision: (head_dim heads) for (heads head_dim)",
        change(attention + "q_proj.linear.weight", regroup(heads)),
    )
    yield (
        "vision: gate and up exchanged",
        exchange(VISION + "mlp.gate_proj.linear.weight", VISION + "mlp.up_proj.linear.weight"),
    )
    yield (
        "vision: x and y of positions exchanged",
        change(
            "model.vision_tower.patch_embedder.position_embedding_table",
            lambda values: values[::-1],
        ),
    )
    yield "vision: standardization lost", change("model.vision_tower.std_scale", ones)


def bounds() -> Iterator[tuple[str, Mistake]]:
    """Mistakes in towers with clip bounds, E2B's."""
    yield (
        "vision: one clip bound lost",
        change(VISION + "mlp.down_proj.input_max", lambda values: np.full_like(values, np.inf)),
    )
    yield (
        "vision: lower bound for upper",
        exchange(VISION + "self_attn.o_proj.output_min", VISION + "self_attn.o_proj.output_max"),
    )
    yield (
        "audio: one clip bound lost",
        change(
            AUDIO + "feed_forward1.ffw_layer_1.input_min",
            lambda values: np.full_like(values, -np.inf),
        ),
    )
    yield (
        "audio: the two feed-forwards exchanged",
        exchange(
            AUDIO + "feed_forward1.ffw_layer_1.linear.weight",
            AUDIO + "feed_forward2.ffw_layer_1.linear.weight",
        ),
    )
