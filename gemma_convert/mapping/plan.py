"""A plan: a flat list of region copies, by source tensor, and the arrays that they fill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from gemma_convert.arrays.dtypes import DTypePolicy, TensorSpec, rounds
from gemma_convert.mapping.region import (
    Region,
    RegionCopy,
)
from gemma_convert.model.architecture import Architecture

BLOCK_BYTES = 32 << 20
"""Largest piece that is read, transposed and written at once, unless another is asked for.

It is the largest chunk of a target too.
"""


def block_limit(asked: int | None) -> int:
    """Bytes of the largest block: those that were asked for, or the default."""
    return asked or BLOCK_BYTES


GATHER_BYTES = 1 << 20
"""Targets up to this size that take several copies are gathered in memory and written at once."""


def is_small(spec: TensorSpec) -> bool:
    """Whether a target is stored as one chunk, and put together in memory."""
    return spec.nbytes <= GATHER_BYTES


@dataclass(frozen=True)
class TargetTensor:
    """One array to be written: its shape, its dtype and the chunk it is stored in.

    `fill` is the value of one that no source tensor goes into.
    """

    spec: TensorSpec
    chunk: tuple[int, ...]
    scale: float | None
    row: str
    fill: int | None = None

    @property
    def gathered(self) -> bool:
        """Whether its parts are put together in memory: it is small, and one chunk."""
        return is_small(self.spec) and self.chunk == self.spec.shape


@dataclass(frozen=True)
class SourceTensor:
    """One source tensor that is converted: the copies that read it, and how it is cut in blocks."""

    spec: TensorSpec
    region: Region
    copies: tuple[RegionCopy, ...]
    steps: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, complete before the first byte is read.

    `tied` and `shared` name tensors that are not stored, and for each the one that it must equal
    bit for bit. `ignored_facts` are keys of config.json that are left out on request. `version` is
    that of the framework, None where the layout knows no versions.
    """

    layout: str
    scanned: bool
    architecture: Architecture
    policy: DTypePolicy
    sources: Mapping[str, SourceTensor]
    targets: Mapping[str, TargetTensor]
    carried: Mapping[str, str]
    tied: Mapping[str, str]
    shared: Mapping[str, str]
    ignored_facts: tuple[str, ...] = ()
    version: str | None = None

    @cached_property
    def equal(self) -> Mapping[str, str]:
        """Tensor that is not stored → the one that it must equal bit for bit."""
        return {**self.tied, **self.shared}

    @cached_property
    def filled(self) -> Mapping[str, TargetTensor]:
        """Arrays that no source tensor goes into."""
        return {name: target for name, target in self.targets.items() if target.fill is not None}

    @cached_property
    def target_bytes(self) -> int:
        return sum(target.spec.nbytes for target in self.targets.values())

    @cached_property
    def source_bytes(self) -> int:
        return sum(source.spec.nbytes for source in self.sources.values())

    @cached_property
    def rounded(self) -> Mapping[str, str]:
        """Source tensors that the dtype policy rounds → how."""
        rounded = {}
        for name, source in self.sources.items():
            for copy in source.copies:
                target = self.targets[copy.target.tensor].spec.dtype
                if rounds(source.spec.dtype, target, scaled=copy.scale is not None):
                    how = f"rounded from {source.spec.dtype} to {target}"
                    if copy.scale is not None:
                        how = f"multiplied by √{copy.scale**2:.0f} and rounded to {target}"
                    rounded[name] = how
        return rounded

    @cached_property
    def copies(self) -> tuple[RegionCopy, ...]:
        return tuple(copy for source in self.sources.values() for copy in source.copies)
