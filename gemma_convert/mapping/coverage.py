"""Coverage: both sides of a plan are covered exactly, or the plan is an error."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.errors import MappingError, SourceError, some
from gemma_convert.mapping.inventory import HFTensor
from gemma_convert.mapping.prefix import difference
from gemma_convert.mapping.region import Box, NotABoxError, RegionCopy
from gemma_convert.model.foreign import refuse_foreign_tensors
from gemma_convert.output import counted

SHOWN = 5


def check_source(
    expected: Mapping[str, HFTensor], source: Mapping[str, TensorSpec], where: str
) -> None:
    """Raises SourceError where a source has not the tensors that its config.json asks for."""
    missing = [name for name, tensor in expected.items() if tensor.required and name not in source]
    unexpected = [name for name in source if name not in expected]
    matrices = {name for name, tensor in expected.items() if tensor.row.together}
    weights = {name: spec.dtype for name, spec in source.items() if name not in matrices}
    refuse_foreign_tensors(weights, where)
    absent = [name for name in expected if name not in source]
    named = difference(unexpected, absent, len(source)) if missing and unexpected else None
    if named is not None:
        raise SourceError(
            "The tensor names are not those of a Gemma 4 checkpoint.",
            where=where,
            expected=some(missing, SHOWN),
            found=f"{some(unexpected, SHOWN)}; {named}",
            do="rename the tensors, or save the checkpoint without what wraps the model",
        )
    _check_head([expected[name] for name in missing], where)
    if missing:
        raise SourceError(
            f"The checkpoint lacks {counted(len(missing), 'tensor')}.",
            where=where,
            expected=some([f"{name} {list(expected[name].shape)}" for name in missing], SHOWN),
            do="check that every shard is there and that config.json belongs to these weights",
        )
    if unexpected:
        raise SourceError(
            f"The checkpoint has {counted(len(unexpected), 'tensor')} that config.json does not "
            "account for.",
            where=where,
            found=some([f"{name} {list(source[name].shape)}" for name in unexpected], SHOWN),
            do="check that config.json belongs to these weights",
        )
    misshapen = [name for name in source if source[name].shape != expected[name].shape]
    if misshapen:
        name = misshapen[0]
        raise SourceError(
            f"The checkpoint has {counted(len(misshapen), 'tensor')} of a shape that config.json "
            "does not ask for.",
            where=f"{where}, tensor {name}",
            expected=list(expected[name].shape),
            found=list(source[name].shape),
            do="check that config.json belongs to these weights",
        )
    _check_groups(expected, source, where)


def _check_head(missing: Sequence[HFTensor], where: str) -> None:
    """An output head of its own is there, where config.json says that there is one."""
    if len(missing) == 1 and missing[0].row.tied is not None:
        head = missing[0]
        raise SourceError(
            "The output head is not tied to the embedding, by config.json, but it is missing.",
            where=where,
            expected=f"{head.name} {list(head.shape)}",
            found="no such tensor",
            do="check that every shard is there; if the embedding is the head, say so in "
            'config.json: "tie_word_embeddings": true',
        )


def _check_groups(
    expected: Mapping[str, HFTensor], source: Mapping[str, TensorSpec], where: str
) -> None:
    """The optional tensors of one layer, or of one weight, are all there or all absent."""
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, tensor in expected.items():
        if tensor.row.optional is not None and not tensor.required:
            together = (tensor.row.together, *tensor.index.values()) if tensor.row.together else ()
            groups[tensor.index.get("layers", -1), *together].append(name)
    for names in groups.values():
        present = [name for name in names if name in source]
        if present and len(present) < len(names):
            raise SourceError(
                "Some of the tensors that belong together are missing.",
                where=where,
                expected=some(names, SHOWN),
                found=some(present, SHOWN),
            )


def check_targets(copies: Sequence[RegionCopy], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises MappingError where copies overlap in a target or leave a part of it uncovered."""
    boxes: dict[str, list[tuple[Box, RegionCopy]]] = defaultdict(list)
    for copy in copies:
        boxes[copy.target.tensor].append((_box(copy), copy))
    for name, shape in shapes.items():
        overlap = _overlap(boxes[name])
        if overlap is not None:
            raise MappingError(
                "Two copies write the same part of a target.",
                where=f"{overlap[0].row} and {overlap[1].row}",
                found=f"{name}, from {overlap[0].source.tensor} and {overlap[1].source.tensor}",
            )
        covered = sum(prod(length for _, length in box) for box, _ in boxes[name])
        if covered != prod(shape):
            raise MappingError(
                "The copies leave a hole in a target.",
                where=", ".join(sorted({copy.row for _, copy in boxes[name]})),
                expected=f"{name} {list(shape)}, {prod(shape)} elements",
                found=f"{covered} elements covered",
            )


def _box(copy: RegionCopy) -> Box:
    try:
        return copy.target.box({})
    except NotABoxError as error:
        raise MappingError(
            "The parts of a tensor are not boxes of its target.", where=copy.row, found=error
        ) from None


def _overlap(entries: list[tuple[Box, RegionCopy]]) -> tuple[RegionCopy, RegionCopy] | None:
    """Two entries whose boxes meet, or None. Boxes on one regular grid need no pairwise look."""
    if len(entries) < 2:
        return None
    lengths = {tuple(length for _, length in box) for box, _ in entries}
    starts = {tuple(start for start, _ in box) for box, _ in entries}
    if len(lengths) == 1 and len(starts) == len(entries):
        (length,) = lengths
        if all(start % n == 0 for at in starts for start, n in zip(at, length, strict=True) if n):
            return None
    for (left, first), (right, second) in itertools.combinations(entries, 2):
        if all(a < b + m and b < a + n for (a, n), (b, m) in zip(left, right, strict=True)):
            return first, second
    return None
