"""A mistake that is tried on a layer of transformers, and the layer that it is tried on."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from gemma_convert.forward.parts import Part
from gemma_convert.logits.tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch

Edit: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"

REACH = 6
"""How many layers away a kernel may be from, that of the next block of six at most."""


@dataclass(frozen=True)
class Subject:
    """A layer that has its weights, what it is called with, and where other layers' weights are.

    `other` gives a parameter of another layer by its path, None where there is none of the shape.
    What stands around the layers of a tower is one of one, whose paths are those of the model.
    """

    layer: Any
    index: int
    layers: int
    named: Mapping[str, Any]
    other: Callable[[int, str], torch.Tensor | None]
    per_layer: Sequence[torch.Tensor] = ()
    """The per-layer inputs of all layers."""

    @property
    def called(self) -> dict[str, Any]:
        """The named arguments; what the layer keeps for others is kept in a copy."""
        return {
            name: copy.copy(value) if name == "shared_kv_states" else value
            for name, value in self.named.items()
        }

    def weight(self, path: str) -> torch.Tensor | None:
        """The parameter or buffer of the layer at `path`; None where it has none."""
        found: Any = self.layer
        for name in path.split("."):
            found = getattr(found, name, None)
        return found

    def kernel(self, path: str) -> str:
        """The path of the weight of a module, which stands one below where it clips."""
        clips = self.weight(f"{path}.linear.weight") is not None
        return f"{path}.linear.weight" if clips else f"{path}.weight"


@dataclass(frozen=True)
class Trial:
    """A mistake in words, and what the layer is when it is made.

    `set` are attributes by path, parameters among them; `called` replaces arguments, and
    `functions` those of the module that the layer's class is from.
    """

    mistake: str
    set: Mapping[str, Any] = field(default_factory=dict)
    called: Mapping[str, Any] = field(default_factory=dict)
    functions: Mapping[str, Any] = field(default_factory=dict)
    per_layer: torch.Tensor | None = None
    given: Mapping[Part, Any] = field(default_factory=dict)
    """What the parts before it make instead."""

    @contextmanager
    def made_on(self, layer: Any) -> Iterator[None]:
        """Within it the layer has the mistake."""
        import torch

        namespace = sys.modules[type(layer).__module__]
        places = [(*_owner(layer, path), value) for path, value in self.set.items()]
        places += [(namespace, name, value) for name, value in self.functions.items()]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
        own = [name in vars(owner) for owner, name, _ in places]
        try:
            for owner, name, value in places:
                is_weight = isinstance(getattr(owner, name), torch.nn.Parameter)
                setattr(owner, name, torch.nn.Parameter(value, False) if is_weight else value)
            yield
        finally:
            for (owner, name, value), was_own in zip(before, own, strict=True):
                if not was_own and name == "forward":
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


def of_other_layers(
    files: TensorFiles, prefix: str, index: int, device: torch.device
) -> Callable[[int, str], torch.Tensor | None]:
    """What a layer's `Subject` calls `other`: names of layers' tensors begin with the prefix."""

    def other(number: int, path: str) -> torch.Tensor | None:
        name, own = (f"{prefix}layers.{one}.{path}" for one in (number, index))
        shape = files.shapes.get(own)
        if shape is None or files.shapes.get(name) != shape:
            return None
        return files.read(name, device=device)

    return other


def neighbours(subject: Subject, reach: int) -> Iterator[int]:
    """Other layers up to `reach` away, the nearest first."""
    for away in range(1, reach + 1):
        for number in (subject.index + away, subject.index - away):
            if 0 <= number < subject.layers:
                yield number


def regrouped(values: torch.Tensor, outer: int, axis: int) -> torch.Tensor:
    """(inner outer) taken for (outer inner) along `axis`."""
    front = values.movedim(axis, 0)
    crossed = front.reshape(outer, -1, *front.shape[1:]).swapaxes(0, 1).reshape(front.shape)
    return crossed.movedim(0, axis)


def identity(value: Any) -> Any:
    """What stands in for a norm or an activation that is lost."""
    return value


def _owner(layer: Any, path: str) -> tuple[Any, str]:
    *parents, name = path.split(".")
    found = layer
    for parent in parents:
        found = getattr(found, parent)
    return found, name
