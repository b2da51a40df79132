"""Mistakes in what a part has of weights: its kernels, its norm, its activation, the scalar.

Modules: `transformers/models/gemma4/modeling_gemma4.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gemma_convert.forward.parts import Part
from gemma_convert.logits.mistakes.trial import (
    Edit,
    Subject,
    Trial,
    identity,
    neighbours,
    regrouped,
)
from gemma_convert.logits.tapped import MADE_BY

if TYPE_CHECKING:
    import torch

WEIGHTS: Mapping[Part, tuple[str, ...]] = {
    "queries": ("self_attn.q_proj", "self_attn.q_norm"),
    "keys": ("self_attn.k_proj", "self_attn.k_norm"),
    "values": ("self_attn.v_proj",),
    "output projection": ("self_attn.o_proj",),
    "dense MLP": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "per-layer gate": ("per_layer_input_gate",),
    "per-layer projection": ("per_layer_projection",),
}
"""The modules with weights that a part is made of, by path in the layer; of norms see `MADE_BY`."""

NAMES: Mapping[str, str] = {
    "self_attn.q_proj": "the query kernel",
    "self_attn.k_proj": "the key kernel",
    "self_attn.v_proj": "the value kernel",
    "self_attn.o_proj": "the output kernel",
    "mlp.gate_proj": "the gate kernel",
    "mlp.up_proj": "the up kernel",
    "mlp.down_proj": "the down kernel",
    "per_layer_input_gate": "the kernel of the gate",
    "per_layer_projection": "the kernel of the projection",
    **{path: part for part, path in MADE_BY.items() if "norm" in part},
    "self_attn.q_norm": "norm of the queries",
    "self_attn.k_norm": "norm of the keys",
}
"""What a module's weight is called in a message."""

REACH = 6
"""How many layers away a kernel may be from, that of the next block of six at most."""

_EPSILONS = (0.0, 1e-8, 1e-6, 1e-5, 1e-4)


def of_kernels(subject: Subject, part: Part) -> Iterator[Trial]:
    """In a part of `WEIGHTS`: its kernels, its norm, its activation."""
    paths = [path for path in WEIGHTS[part] if subject.weight(f"{path}.weight") is not None]
    if part == "values" and not paths:
        paths = ["self_attn.k_proj"]
    yield from _exchanged(subject, part)
    for path in paths:
        if path.endswith("norm"):
            yield from of_norm(subject, path)
        else:
            yield from _of_matrix(subject, path)
    for number in neighbours(subject, REACH):
        found = {f"{path}.weight": subject.other(number, f"{path}.weight") for path in paths}
        if all(value is not None for value in found.values()):
            yield Trial(f"its weights are those of layer {number}", found)
    if part == "values":
        yield Trial("the norm of the values is lost", {"self_attn.v_norm.forward": identity})
        yield from _of_epsilon(subject, "self_attn.v_norm")
    if part == "dense MLP":
        down = subject.layer.mlp.down_proj.weight
        yield Trial("gate, up or down is zero", {"mlp.down_proj.weight": down * 0})
        yield from of_activation("mlp.act_fn.forward")
    if part == "per-layer gate":
        import torch

        yield Trial("its activation is lost", {"act_fn.forward": identity})
        yield Trial("its activation is SiLU", {"act_fn.forward": torch.nn.functional.silu})
        for number in range(subject.layers):
            if number != subject.index:
                yield Trial(
                    f"it is given the per-layer input of layer {number}",
                    per_layer=subject.per_layer(number),
                )


def _exchanged(subject: Subject, part: Part) -> Iterator[Trial]:
    """Two kernels of one layer, each in the place of the other."""
    pairs = {
        "keys": ("self_attn.k_proj", "self_attn.v_proj", "keys and values are exchanged"),
        "values": ("self_attn.v_proj", "self_attn.k_proj", "keys and values are exchanged"),
        "dense MLP": ("mlp.gate_proj", "mlp.up_proj", "gate and up are exchanged"),
    }
    if part in pairs:
        one, other, words = pairs[part]
        first, second = subject.weight(f"{one}.weight"), subject.weight(f"{other}.weight")
        if first is not None and second is not None:
            yield Trial(words, {f"{one}.weight": second, f"{other}.weight": first})


def _of_matrix(subject: Subject, path: str) -> Iterator[Trial]:
    name, weight = NAMES[path], subject.weight(f"{path}.weight")
    if weight is None:
        return
    for words, edit in _edits(subject, path):
        yield Trial(f"{name}: {words}", {f"{path}.weight": edit(weight)})
    for number in neighbours(subject, REACH):
        other = subject.other(number, f"{path}.weight")
        if other is not None:
            yield Trial(f"{name} is that of layer {number}", {f"{path}.weight": other})


def _edits(subject: Subject, path: str) -> Iterator[tuple[str, Edit]]:
    """What may have happened to the values of a matrix [out in]."""
    if path.startswith("self_attn."):
        yield from _edits_of_heads(subject, path)
    yield "it is read in the shape of its transpose", lambda values: values.T.reshape(values.shape)
    yield "a square block of it is transposed", _square_transposed
    yield "its outputs are in reverse order", lambda values: values.flip(0)
    if not path.startswith("mlp."):
        yield "it is zero", lambda values: values * 0
    yield "its outputs are shifted by one", lambda values: values.roll(1, 0)
    yield "its outputs are shifted by one", lambda values: values.roll(-1, 0)
    yield "its inputs are shifted by one", lambda values: values.roll(1, 1)
    yield "its inputs are shifted by one", lambda values: values.roll(-1, 1)


def _edits_of_heads(subject: Subject, path: str) -> Iterator[tuple[str, Edit]]:
    """Of a kernel of attention, whose outputs or inputs are (heads head_dim)."""
    head_dim, axis = subject.layer.self_attn.head_dim, int(path.endswith("o_proj"))
    weight = subject.weight(f"{path}.weight")
    heads = 1 if weight is None else weight.shape[axis] // head_dim
    if heads > 1:
        words = "its heads and head_dim are exchanged"
        yield words, lambda values: regrouped(values, heads, axis)
        yield words, lambda values: regrouped(values, head_dim, axis)
        yield "its heads are shifted by one", lambda values: values.roll(head_dim, axis)
        yield "its heads are shifted by one", lambda values: values.roll(-head_dim, axis)
    if not axis:
        words = "the halves of its rotary dimension are interleaved"
        yield words, lambda values: _by_head(values, heads, 2)
        yield words, lambda values: _by_head(values, heads, head_dim // 2)


def of_norm(subject: Subject, path: str) -> Iterator[Trial]:
    """In the norm at `path` of the layer."""
    import torch

    weight, place = subject.weight(f"{path}.weight"), f"{path}.weight"
    if weight is None:
        return
    yield Trial("its weight is lost", {place: torch.ones_like(weight)})
    yield Trial("its weight is too large by one", {place: weight + 1})
    yield Trial("its weight is too small by one", {place: weight - 1})
    yield Trial("its weight is applied twice", {place: weight * weight})
    yield Trial("the norm is lost", {f"{path}.forward": identity})
    yield Trial("its weight is zero", {place: weight * 0})
    for other, module in subject.layer.named_modules():
        found = getattr(module, "weight", None)
        if other != path and other in NAMES and found is not None and found.shape == weight.shape:
            yield Trial(f"it has the weight of the {NAMES[other]}", {place: found})
    for number in neighbours(subject, subject.layers):
        found = subject.other(number, place)
        if found is not None:
            yield Trial(f"its weight is that of layer {number}", {place: found})
    yield from _of_epsilon(subject, path)


def _of_epsilon(subject: Subject, path: str) -> Iterator[Trial]:
    for epsilon in _EPSILONS:
        if epsilon != subject.layer.input_layernorm.eps:
            yield Trial(f"its epsilon is {epsilon:g}", {f"{path}.eps": epsilon})


def of_activation(path: str) -> Iterator[Trial]:
    """In the activation whose `forward` is at `path` of the layer."""
    import torch

    yield Trial("its activation is lost", {path: identity})
    yield Trial("its activation is SiLU", {path: torch.nn.functional.silu})
    yield Trial("its activation is the exact GELU", {path: torch.nn.functional.gelu})


def of_scalar(subject: Subject) -> Iterator[Trial]:
    """In what the layer's output is multiplied with."""
    scalar = subject.layer.layer_scalar
    yield Trial("the layer's scalar is lost", {"layer_scalar": scalar * 0 + 1})
    yield Trial("the layer's scalar is applied twice", {"layer_scalar": scalar * scalar})
    yield Trial("the layer's scalar is zero", {"layer_scalar": scalar * 0})
    yield Trial("the layer's scalar is divided by", {"layer_scalar": 1 / scalar})
    for number in neighbours(subject, subject.layers):
        found = subject.other(number, "layer_scalar")
        if found is not None:
            yield Trial(f"the layer's scalar is that of layer {number}", {"layer_scalar": found})


def _by_head(values: torch.Tensor, heads: int, outer: int) -> torch.Tensor:
    """Each head of a kernel [(heads head_dim) in] regrouped by itself."""
    import torch

    return torch.cat([regrouped(head, outer, 0) for head in values.chunk(heads)])


def _square_transposed(values: torch.Tensor) -> torch.Tensor:
    side, changed = min(values.shape), values.clone()
    changed[:side, :side] = values[:side, :side].T
    return changed
