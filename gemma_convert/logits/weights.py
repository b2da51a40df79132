"""transformers' modules with their weights in float32 only while they are called, or for longer.

What runs once for a sequence (embeddings, towers, projections) is filled when it is called and
emptied again; a decoder layer is filled for all sequences, and what mistakes are made on for all of
those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gemma_convert.logits.tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch


class Weights:
    """What fills the modules of transformers' `model` from the files of its checkpoint."""

    def __init__(
        self, model: Any, text: Any, prefix: str, files: TensorFiles, device: torch.device
    ) -> None:
        """`text` is its language model, the names of whose tensors begin with `prefix`."""
        self._model, self._text, self._prefix = model, text, prefix
        self._files, self._device = files, device
        self._held: set[Any] = set()
        self._fill_when_called()

    def _fill_when_called(self) -> None:
        """Gives every module but the layers its own weights for the time of a call."""
        tables = [
            name for name in ("embed_tokens", "embed_tokens_per_layer") if hasattr(self._text, name)
        ]
        for name in tables:
            self._gather_when_called(getattr(self._text, name), f"{self._prefix}{name}.weight")
        left_out = tuple(f"{self._prefix}{name}" for name in ("layers.", *tables))
        for path, module in self._model.named_modules(prefix="model"):
            if f"{path}.".startswith(left_out) or not _own(module):
                continue
            prefix = f"{path}."
            module.register_forward_pre_hook(
                lambda module, _, prefix=prefix: self._fill_unless_held(module, prefix)
            )
            empty = _own(module)
            module.register_forward_hook(
                lambda module, _, __, empty=empty: self._put_unless_held(module, empty)
            )

    @contextmanager
    def holding(self, paths: Sequence[str], but: str | None = None) -> Iterator[None]:
        """Within it modules at and below `paths`, but none below `but`, keep their weights."""
        held = {
            f"{name}.": module
            for name, module in self._model.named_modules(prefix="model")
            if f"{name}.".startswith(tuple(f"{path}." for path in paths))
            and not (but and name.startswith(but))
        }
        empty = {module: _own(module) for module in held.values()}
        for prefix, module in held.items():
            self.fill(module, prefix)
        self._held = set(empty)
        try:
            yield
        finally:
            self._held = set()
            for module, tensors in empty.items():
                _put(module, tensors)

    def _fill_unless_held(self, module: Any, prefix: str) -> None:
        if module not in self._held:
            self.fill(module, prefix)

    def _put_unless_held(self, module: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        if module not in self._held:
            _put(module, tensors)

    def _gather_when_called(self, table: Any, name: str) -> None:
        """Gives an embedding the rows that it is called for, and numbers that find them there.

        Between calls every row of its weight is that of padding, which `Gemma4Model.forward` reads.
        """
        import torch

        row = table.padding_idx or 0  # without padding none is read
        padding = self._files.read(name, slice(row, row + 1))
        between = torch.nn.Parameter(padding.to(self._device).expand(table.weight.shape), False)
        table.weight, table.padding_idx = between, None

        def fill(module: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            rows, places = given[0].unique(return_inverse=True)
            weight = self._files.read(name, rows.cpu(), self._device)
            module.weight = torch.nn.Parameter(weight, False)
            return (places,)

        def empty(module: Any, _: Any, __: Any) -> None:
            module.weight = between

        table.register_forward_pre_hook(fill)
        table.register_forward_hook(empty)

    def fill(self, module: Any, prefix: str, deep: bool = False) -> None:
        """Its weights in float32, those of the modules in it too if `deep`."""
        import torch

        for path, part in module.named_modules() if deep else [("", module)]:
            for name, tensor in _own(part).items():
                stored = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
                value = self._files.read(stored, device=self._device)
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                setattr(part, name, torch.nn.Parameter(value, False) if is_parameter else value)


def _own(module: Any) -> dict[str, torch.Tensor]:
    """The parameters and the stored buffers of a module, without those of modules in it."""
    computed = module._non_persistent_buffers_set
    buffers = {name: one for name, one in module._buffers.items() if name not in computed}
    return {
        name: one
        for name, one in (*module._parameters.items(), *buffers.items())
        if one is not None
    }


def _put(module: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Sets parameters and buffers of a module."""
    for name, tensor in tensors.items():
        setattr(module, name, tensor)


def empty(module: Any) -> None:
    """Drops the weights of a module, and of the modules in it, that `fill` gave."""
    for part in module.modules():
        _put(part, {name: _like(tensor) for name, tensor in _own(part).items()})


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or a parameter, of the same shape without values."""
    import torch

    empty = torch.empty_like(tensor, device="meta")
    return torch.nn.Parameter(empty, False) if isinstance(tensor, torch.nn.Parameter) else empty
