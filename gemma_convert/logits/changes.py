"""What an adapter of PEFT adds to the weights that the reference reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.engine.adapter_pairs import AdapterPairs
from gemma_convert.model.adapter import read_adapter
from gemma_convert.stores.weights import open_weights

if TYPE_CHECKING:
    import torch

PIECE_VALUES = 1 << 22
"""Most values that are in memory in float64; a piece has one row at the least."""


class Changes:
    """scaling · B · A of an adapter's weights, for its base model whose tensors are `base`."""

    def __init__(self, base: dict[str, TensorSpec], pairs: AdapterPairs, merged: bool) -> None:
        """A `merged` one is rounded to the dtype of the weight, as a merged checkpoint holds it."""
        self._base, self._pairs, self._merged = base, pairs, merged
        self.weights = frozenset(pairs.weights)

    def add(self, name: str, value: torch.Tensor, rows: slice | torch.Tensor | None) -> None:
        """Adds to `value` in float32, which is the weight `name` or `rows` of it, in float64."""
        import torch

        dtype = getattr(torch, self._base[name].dtype) if self._merged else value.dtype
        for expert, part in enumerate(value if value.ndim == 3 else [value]):
            a, b = map(torch.from_numpy, self._pairs.factors(name, expert))
            chosen = (b if rows is None else b[rows]).to(value.device)
            step = max(1, PIECE_VALUES // part.shape[-1])
            for piece, left in zip(part.split(step), chosen.split(step), strict=True):
                delta = self._pairs.adapter.scaling * (left @ a.to(value.device))
                piece.copy_((piece.double() + delta).to(dtype))


@contextmanager
def adapter_changes(base: Path, adapter: Path, *, merged: bool) -> Iterator[Changes]:
    """The changes that the adapter of PEFT in one folder makes to the model in another.

    Raises SourceError where they do not fit.
    """
    facts = read_adapter(adapter)
    with open_weights(base) as weights, open_weights(adapter) as matrices:
        specs = dict(weights.specs)
        yield Changes(specs, AdapterPairs(specs, matrices, facts), merged)
