"""What the parts of transformers' decoder layer make, seen while it runs, and put there instead.

Modules: `Gemma4TextDecoderLayer` in `transformers/models/gemma4/modeling_gemma4.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from gemma_convert.forward.parts import Part

if TYPE_CHECKING:
    import torch

Values: TypeAlias = dict[Part, Any]
"""What each part made: a tensor [1 length *features] or [length features]; a router, three."""

MADE_BY: Mapping[Part, str] = {
    "norm before attention": "input_layernorm",
    "queries": "self_attn.q_norm",
    "keys": "self_attn.k_norm",
    "values": "self_attn.v_norm",
    "output projection": "self_attn.o_proj",
    "norm behind attention": "post_attention_layernorm",
    "norm before the MLP": "pre_feedforward_layernorm",
    "dense MLP": "mlp",
    "norm behind the dense MLP": "post_feedforward_layernorm_1",
    "router": "router",
    "norm before the experts": "pre_feedforward_layernorm_2",
    "experts": "experts",
    "norm behind the experts": "post_feedforward_layernorm_2",
    "norm behind the MLP": "post_feedforward_layernorm",
    "per-layer projection": "per_layer_projection",
    "norm behind the per-layer input": "post_per_layer_input_norm",
    "output": "",
}
"""The module whose output a part is, by its path in the layer."""

GIVEN_TO: Mapping[Part, str] = {
    "attention": "self_attn.o_proj",
    "sum behind attention": "pre_feedforward_layernorm",
    "sum behind the MLP": "per_layer_input_gate",
    "per-layer gate": "per_layer_projection",
}
"""The module that a part is given to."""

_GIVEN_TO_OF_MIXTURE: Mapping[Part, str] = {
    **GIVEN_TO,
    "sum of both branches": "post_feedforward_layernorm",
}


def tapped(layer: Any, use: Callable[[Part, Any], Any]) -> AbstractContextManager[None]:
    """Within it `use` is called with what each part makes; what it returns stands in, unless None.

    A sum that stands in reaches the module behind it alone, and not what is added later.
    """
    mixture = hasattr(layer, "experts")
    return seen_at(layer, MADE_BY, _GIVEN_TO_OF_MIXTURE if mixture else GIVEN_TO, use)


@contextmanager
def seen_at(
    root: Any,
    made_by: Mapping[Part, str],
    given_to: Mapping[Part, str],
    use: Callable[[Part, Any], Any],
) -> Iterator[None]:
    """`tapped` of any module, by the paths of those that make its parts or are given them."""
    modules = dict(root.named_modules())

    def seen(part: Part) -> Callable[..., Any]:
        return lambda _, __, made: use(part, made)

    def seen_before(part: Part) -> Callable[..., Any]:
        def hook(_: Any, given: tuple[Any, ...]) -> Any:
            value = use(part, given[0])
            return None if value is None else (value, *given[1:])

        return hook

    with ExitStack() as stack:
        for part, path in given_to.items():
            if path in modules:
                handle = modules[path].register_forward_pre_hook(seen_before(part))
                stack.callback(handle.remove)
        for part, path in made_by.items():
            if path in modules:
                stack.callback(modules[path].register_forward_hook(seen(part)).remove)
        yield


def features(part: Part, value: Any) -> torch.Tensor:
    """What a part made as [length features]; of the router, the share of each expert."""
    if part == "router":
        probabilities, shares, experts = value
        found: torch.Tensor = probabilities.new_zeros(probabilities.shape).scatter(
            -1, experts, shares.to(probabilities.dtype)
        )
        return found
    if part in ("experts", "norm before the experts"):
        flat: torch.Tensor = value
        return flat.reshape(-1, flat.shape[-1])
    made: torch.Tensor = value[0]
    return made.reshape(made.shape[0], -1)


def first(part: Part, value: Any, length: int) -> Any:
    """What a part made of the first tokens."""
    if part == "router":
        probabilities, shares, experts = value
        return probabilities[:length], shares[:length], experts[:length]
    if part in ("experts", "norm before the experts"):
        return value[:length]
    return value[:, :length]


def cast(part: Part, value: Any, dtype: torch.dtype) -> Any:
    """What a part made in another dtype; numbers of experts stay numbers."""
    if part == "router":
        probabilities, shares, experts = value
        return probabilities.to(dtype), shares.to(dtype), experts
    return value.to(dtype)
