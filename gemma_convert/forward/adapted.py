"""A native adapter on a native model: layers, some of whose kernels are adapted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.tree_util import DictKey

from gemma_convert.errors import SourceError, some
from gemma_convert.forward.adapted_kernel import AdaptedKernel
from gemma_convert.forward.decoder_weights import DecoderWeights, LayerWeights
from gemma_convert.forward.sharding import Axes

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class NativeChanges:
    """The matrices of an adapter in `folder`: layer → path below it of a kernel → A and B."""

    folder: Path
    layers: Mapping[int, Mapping[str, tuple[Any, Any]]]
    scaling: float


class AdaptedWeights:
    """The weights of a model, some of whose layers have adapted kernels."""

    def __init__(self, weights: DecoderWeights, changes: NativeChanges, layers: int) -> None:
        """Raises SourceError for matrices of what the model does not have, or not as a kernel."""
        self._weights, self._changes = weights, changes
        unknown = [
            f"layer {index}, {name}"
            for index, matrices in changes.layers.items()
            for name in matrices
            if index >= layers or not _adaptable(weights.layer_axes(index).get(name, ()))
        ]
        if unknown:
            raise SourceError(
                "The adapter has matrices of arrays that its base model does not have, or that no "
                "adapter changes.",
                where=changes.folder,
                found=some(unknown),
                do="name the conversion of the model that it was trained on with --native-base",
            )

    def layer(self, index: int) -> LayerWeights:
        matrices = self._changes.layers.get(index, {})

        def adapted(path: tuple[Any, ...], array: Any) -> Any:
            name = "/".join(str(entry.key) for entry in path if isinstance(entry, DictKey))
            if name not in matrices:
                return array
            return AdaptedKernel(array, *matrices[name], self._changes.scaling, name)

        found: LayerWeights = jax.tree_util.tree_map_with_path(adapted, self._weights.layer(index))
        return found

    def layer_axes(self, index: int) -> Mapping[str, Axes]:
        return self._weights.layer_axes(index)

    def embedding(
        self, tokens: Int[np.ndarray, "batch length"]
    ) -> Float[Array, "batch length embed"]:
        return self._weights.embedding(tokens)

    def per_layer_rows(
        self, tokens: Int[np.ndarray, "batch length"]
    ) -> Float[Array, "batch length layers ple"]:
        return self._weights.per_layer_rows(tokens)

    def per_layer_context(
        self, embedded: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length layers ple"]:
        return self._weights.per_layer_context(embedded)

    def per_layer_scale(self) -> Float[Array, " ple"]:
        return self._weights.per_layer_scale()

    def final_scale(self) -> Float[Array, " embed"]:
        return self._weights.final_scale()


def _adaptable(axes: Axes) -> bool:
    """Whether a layer multiplies by an array with these axes as a whole: no norm, no experts."""
    return len(axes) > 1 and axes[0] != "experts"
