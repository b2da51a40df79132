"""Mistakes in what a part has of weights: its kernels, its norm, its activation, the scalar.

Modules: `transformers/models/gemma4/modeling_gemma4.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from gemma_convert.forward.parts import Part
from gemma_convert.logits.mistakes.bounds import of_bounds
from gemma_convert.logits.mistakes.trial import (
    REACH,
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

EXCHANGED: Mapping[Part, tuple[tuple[str, str, str], ...]] = {
    "queries": (
        ("self_attn.q_proj", "self_attn.k_proj", "queries and keys are exchanged"),
        ("self_attn.q_proj", "self_attn.v_proj", "queries and values are exchanged"),
    ),
    "keys": (
        ("self_attn.k_proj", "self_attn.v_proj", "keys and values are exchanged"),
        ("self_attn.k_proj", "self_attn.q_proj", "queries and keys are exchanged"),
    ),
    "values": (
        ("self_attn.v_proj", "self_attn.k_proj", "keys and values are exchanged"),
        ("self_attn.v_proj", "self_attn.q_proj", "queries and values are exchanged"),
    ),
    "dense MLP": (("mlp.gate_proj", "mlp.up_proj", "gate and up are exchanged"),),
}
"""Two kernels of one shape in a part, each of which may be in the place of the other."""

_ONE_OF_SEVERAL = ("mlp.", "feed_forward", "lconv1d.")
"""Kernels that make zeros of a part if any of them is zero, so that none can be named."""

_EPSILONS = (0.0, 1e-8, 1e-6, 1e-5, 1e-4)


def of_kernels(subject: Subject, part: Part) -> Iterator[Trial]:
    """In a part of `WEIGHTS`: its kernels, its norm, its activation."""
    paths = [path for path in WEIGHTS[part] if _weight(subject, path) is not None]
    if part == "values" and not paths:
        paths = ["self_attn.k_proj"]
    yield from of_exchange(subject, part)
    yield from of_modules(subject, paths, NAMES)
    if part == "values":
        yield Trial("the norm of the values is lost", {"self_attn.v_norm.forward": identity})
        yield from of_epsilon(subject, "self_attn.v_norm")
    if part == "dense MLP":
        down = subject.kernel("mlp.down_proj")
        zeros = subject.layer.get_parameter(down) * 0
        yield Trial("gate, up or down is zero", {down: zeros})
        yield from of_activation("mlp.act_fn.forward")
    if part == "per-layer gate":
        import torch

        yield Trial("its activation is lost", {"act_fn.forward": identity})
        yield Trial("its activation is SiLU", {"act_fn.forward": torch.nn.functional.silu})
        for number in range(subject.layers):
            if number != subject.index:
                yield Trial(
                    f"it is given the per-layer input of layer {number}",
                    per_layer=subject.per_layer[number],
                )


def of_exchange(subject: Subject, part: Part) -> Iterator[Trial]:
    """Two kernels of one layer, each in the place of the other."""
    for one, other, words in EXCHANGED.get(part, ()):
        first, second = _weight(subject, one), _weight(subject, other)
        if first is not None and second is not None and first.shape == second.shape:
            yield Trial(words, {subject.kernel(one): second, subject.kernel(other): first})


def of_modules(subject: Subject, paths: Sequence[str], names: Mapping[str, str]) -> Iterator[Trial]:
    """In the modules with weights that a part is made of, norms and kernels by their `names`."""
    for path in paths:
        if "norm" in path.rpartition(".")[2]:
            yield from of_norm(subject, path, names)
        else:
            weight = _weight(subject, path)
            edits = _edits(subject, path) if weight is not None and weight.dim() == 2 else ()
            yield from of_kernel(subject, path, names[path], edits)
            yield from of_bounds(subject, path, names)
    modules = [(path, subject.layer.get_submodule(path)) for path in paths]
    places = [f"{path}.{name}" for path, module in modules for name in module.state_dict()]
    for number in neighbours(subject, REACH):
        found = {place: subject.other(number, place) for place in places}
        if all(value is not None for value in found.values()):
            yield Trial(f"its weights are those of layer {number}", found)


def of_kernel(
    subject: Subject, path: str, name: str, edits: Iterable[tuple[str, Edit]]
) -> Iterator[Trial]:
    """In the values of one kernel, which is of another layer or has one of the `edits`."""
    place = subject.kernel(path)
    weight = subject.weight(place)
    for words, edit in edits:
        yield Trial(f"{name}: {words}", {place: edit(weight)})
    for number in neighbours(subject, REACH):
        other = subject.other(number, place)
        if other is not None:
            yield Trial(f"{name} is that of layer {number}", {place: other})


def _weight(subject: Subject, path: str) -> torch.Tensor | None:
    return subject.weight(subject.kernel(path))


def _edits(subject: Subject, path: str) -> Iterator[tuple[str, Edit]]:
    """What may have happened to the values of a matrix [out in]."""
    if path.startswith("self_attn."):
        yield from _edits_of_heads(subject, path)
    yield from matrix_edits()
    if not path.startswith(_ONE_OF_SEVERAL):
        yield "it is zero", lambda values: values * 0


def matrix_edits() -> Iterator[tuple[str, Edit]]:
    """What may have happened to the values of any matrix [out in]."""
    yield "it is read in the shape of its transpose", lambda values: values.T.reshape(values.shape)
    yield "a square block of it is transposed", _square_transposed
    yield "its outputs are in reverse order", lambda values: values.flip(0)
    yield "its outputs are shifted by one", lambda values: values.roll(1, 0)
    yield "its outputs are shifted by one", lambda values: values.roll(-1, 0)
    yield "its inputs are shifted by one", lambda values: values.roll(1, 1)
    yield "its inputs are shifted by one", lambda values: values.roll(-1, 1)


def _edits_of_heads(subject: Subject, path: str) -> Iterator[tuple[str, Edit]]:
    """Of a kernel of attention, whose outputs or inputs are (heads head_dim)."""
    head_dim, axis = subject.layer.self_attn.head_dim, int(path.endswith(("o_proj", "post")))
    weight = _weight(subject, path)
    heads = 1 if weight is None else weight.shape[axis] // head_dim
    if heads > 1:
        words = "its heads and head_dim are exchanged"
        yield words, lambda values: regrouped(values, heads, axis)
        yield words, lambda values: regrouped(values, head_dim, axis)
        yield "its heads are shifted by one", lambda values: values.roll(head_dim, axis)
        yield "its heads are shifted by one", lambda values: values.roll(-head_dim, axis)
    if not axis and hasattr(subject.layer.self_attn, "q_norm"):
        words = "the halves of its rotary dimension are interleaved"
        yield words, lambda values: _by_head(values, heads, 2)
        yield words, lambda values: _by_head(values, heads, head_dim // 2)
        if head_dim % 4 == 0:  # a patch turns by x in one half of a head and by y in the other
            yield words, lambda values: _by_head(values, 2 * heads, 2)
            yield words, lambda values: _by_head(values, 2 * heads, head_dim // 4)


def of_norm(subject: Subject, path: str, names: Mapping[str, str] = NAMES) -> Iterator[Trial]:
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
        if other != path and other in names and found is not None and found.shape == weight.shape:
            yield Trial(f"it has the weight of the {names[other]}", {place: found})
    for number in neighbours(subject, subject.layers):
        found = subject.other(number, place)
        if found is not None:
            yield Trial(f"its weight is that of layer {number}", {place: found})
    yield from of_epsilon(subject, path)


def of_epsilon(subject: Subject, path: str) -> Iterator[Trial]:
    """In what is added to the mean square in the norm at `path` of the layer."""
    for epsilon in _EPSILONS:
        if epsilon != subject.layer.get_submodule(path).eps:
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
