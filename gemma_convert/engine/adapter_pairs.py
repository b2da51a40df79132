"""The pairs of matrices of an adapter of PEFT: which weight each changes, and their values.

A weight [out in] has A [rank in] and B [out rank]. Batched experts [experts out in] have a pair
each: A [(experts rank) in] and B [out (rank experts)], as `ParamWrapper.get_delta_weight` in PEFT's
`tuners/lora/layer.py` (0.21) takes them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from gemma_convert.arrays.dtypes import CONVERTED, TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.errors import SourceError, some
from gemma_convert.model.adapter import Adapter, check_matrices, of_experts
from gemma_convert.stores.tensor_folder import TensorFolder

_A, _B, _WEIGHT = ".lora_A.weight", ".lora_B.weight", ".weight"
_WHOLE_TEXT, _TEXT_ALONE = "model.language_model.", "model."
_BATCHED = ("gate_up_proj", "down_proj")
"""The parameters of the experts, in the order of transformers' `Gemma4TextExperts` (5.23)."""


class AdapterPairs:
    """The pairs of the adapter in `matrices`, by the names of the weights of `base`.

    Raises SourceError where a matrix lacks its partner or the base model its weight, and where
    their shapes do not fit.
    """

    def __init__(
        self, base: Mapping[str, TensorSpec], matrices: TensorFolder, adapter: Adapter
    ) -> None:
        check_matrices(adapter, matrices.specs, matrices.folder)
        self.adapter, self._matrices = adapter, matrices
        self._base, self._names = base, _names(base, matrices.specs, adapter, matrices.folder)
        self._by_expert = lru_cache(1)(self._read_by_expert)
        self.factors = lru_cache(1)(self._factors)

    @property
    def weights(self) -> list[str]:
        """The names of the weights that the adapter changes."""
        return list(self._names)

    def _factors(self, weight: str, expert: int) -> tuple[Array, Array]:
        """Matrix A [rank in] and B [out rank] in float64, of one expert where `weight` is batched.

        Where it is not, `expert` is 0.
        """
        a, b = self._by_expert(weight)
        return a[expert].astype(np.float64), b[expert].astype(np.float64)

    def _read_by_expert(self, weight: str) -> tuple[Array, Array]:
        """A [experts rank in] and B [experts out rank], one expert of a weight that has none."""
        a, b = (self._read(name) for name in self._names[weight])
        rank = self.adapter.rank
        experts = len(a) // rank
        b = b.reshape(-1, rank, experts).transpose(2, 0, 1)
        return a.reshape(experts, rank, -1), np.ascontiguousarray(b)

    def _read(self, name: str) -> Array:
        tensor = self._matrices.tensors[name]
        values = np.empty(tensor.spec.shape, numpy_dtype(tensor.spec.dtype))
        self._matrices.read_into(tensor, 0, values.reshape(-1).view(np.uint8).data)
        return values

    def check_unchanged(self) -> None:
        """Raises SourceError where the adapter has changed since it was opened."""
        self._matrices.check_unchanged()


def _names(
    base: Mapping[str, TensorSpec],
    matrices: Mapping[str, TensorSpec],
    adapter: Adapter,
    where: Path,
) -> dict[str, tuple[str, str]]:
    """Weight of the base model → the names of its matrices A and B."""
    found: dict[str, tuple[str, str]] = {}
    for name, spec in matrices.items():
        if spec.dtype not in CONVERTED or len(spec.shape) != 2:
            raise SourceError(
                "A tensor of the adapter is no matrix of floating-point numbers.",
                where=f"{where}, tensor {name}",
                expected=f"{', '.join(CONVERTED)}, two dimensions",
                found=f"{spec.dtype} {list(spec.shape)}",
            )
    _check_experts(matrices, adapter, where)
    for name in matrices:
        module = name.removesuffix(_A).removesuffix(_B)
        a, b, weight = module + _A, module + _B, _weight(module, base, adapter)
        if a not in matrices or b not in matrices:
            raise SourceError(
                "A matrix of the adapter lacks its partner.",
                where=where,
                expected=f"{a} and {b}",
                found=name,
            )
        if weight is None:
            raise SourceError(
                "The adapter changes a weight that its base model does not have.",
                where=where,
                expected=some([one for one in base if one.endswith(_WEIGHT)], 3),
                found=module + _WEIGHT,
                do="name the model that the adapter was trained on with --base",
            )
        if found.get(weight, (a, b)) != (a, b):
            raise SourceError(
                "Two pairs of matrices change the same weight.",
                where=where,
                found=f"{found[weight][0]} and {a}",
                do="save the adapter again, from one model",
            )
        _check_shapes(base[weight], matrices[a], matrices[b], adapter.rank, f"{where}, {module}")
        found[weight] = a, b
    return found


def _check_experts(matrices: Iterable[str], adapter: Adapter, where: Path) -> None:
    """Raises SourceError where experts have other pairs than `target_parameters` says."""
    found: dict[str, set[int]] = {}
    for name in matrices:
        place = of_experts(name.removesuffix(_A).removesuffix(_B))
        if place is not None:
            found.setdefault(place[0], set()).add(place[1])
    for experts, around in found.items():
        targeted = _targeted(experts, adapter)
        if around != set(range(len(targeted))):
            raise SourceError(
                "The adapter has other pairs for batched experts than adapter_config.json says.",
                where=f"{where}, {experts}",
                expected=f"{len(targeted)} pairs, by target_parameters {list(adapter.parameters)}",
                found=f"{len(around)} pairs",
                do="save the adapter again with save_pretrained() of PEFT",
            )


def _check_shapes(weight: TensorSpec, a: TensorSpec, b: TensorSpec, rank: int, where: str) -> None:
    *batch, outputs, inputs = weight.shape if len(weight.shape) in {2, 3} else (0, 0)
    columns = rank * (batch[0] if batch else 1)
    if (a.shape, b.shape) != ((columns, inputs), (outputs, columns)):
        raise SourceError(
            "The matrices of the adapter do not fit the weight that they change.",
            where=where,
            expected=f"a weight of {list(weight.shape)}, and rank {rank}",
            found=f"A {list(a.shape)} and B {list(b.shape)}",
            do="name the model that the adapter was trained on with --base",
        )


def _weight(module: str, base: Mapping[str, TensorSpec], adapter: Adapter) -> str | None:
    """The weight of a module, where the text model may be named as a whole or as a part."""
    experts = of_experts(module)
    name = module + _WEIGHT
    if experts is not None:
        # Those that are targeted are adapted in their order, each around those before it.
        name = _targeted(experts[0], adapter)[-1 - experts[1]]
    names = (
        name,
        name.replace(_TEXT_ALONE, _WHOLE_TEXT, 1),
        name.replace(_WHOLE_TEXT, _TEXT_ALONE, 1),
    )
    return next((name for name in names if name in base), None)


def _targeted(experts: str, adapter: Adapter) -> list[str]:
    """The parameters of `experts` that the adapter changes, in the order of the module."""
    return [
        name
        for name in (f"{experts}.{parameter}" for parameter in _BATCHED)
        if any(name == end or name.endswith(f".{end}") for end in adapter.parameters)
    ]
