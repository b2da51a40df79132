"""Tensors that a layout has once must be the same, bit for bit, before one stands for the other."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from gemma_convert.arrays.dtypes import numpy_dtype
from gemma_convert.engine.transfer import HuggingFaceTensors
from gemma_convert.errors import SourceError
from gemma_convert.mapping.plan import Plan


def check_equal(plan: Plan, tensors: HuggingFaceTensors, where: Path) -> None:
    """Raises SourceError where a tensor is not what the one that stands for it is, bit for bit."""
    for name, other in plan.tied.items():
        if not _same(tensors, name, other):
            raise SourceError(
                "config.json says that the output head is tied to the embedding, but it differs.",
                where=where,
                expected=f"{name} equal to {other}, bit for bit",
                found="different values",
                do="if the head is the model's own, say so in config.json, outside of text_config "
                'where there is one: "tie_word_embeddings": false',
            )
    adapted = plan.architecture.adapter is not None
    for name, other in plan.shared.items():
        if not _same(tensors, name, other):
            raise SourceError(
                f"{plan.layout} has a single tensor for two that differ here.",
                where=where,
                expected=f"{name} equal to {other}, bit for bit",
                found=f"{_shown(tensors, name)} and {_shown(tensors, other)}",
                do="merge the adapter into its base model with --merge"
                if adapted
                else "make them equal, choose another layout, or leave out the towers: --text-only",
            )


def _same(tensors: HuggingFaceTensors, name: str, other: str) -> bool:
    if tensors.specs[name] != tensors.specs[other]:
        return False
    pairs = itertools.zip_longest(tensors.pieces(name), tensors.pieces(other))
    return all(one == two for one, two in pairs)


def _shown(tensors: HuggingFaceTensors, name: str) -> str:
    """The first value of a tensor, for a message."""
    spec = tensors.specs[name]
    piece = next(tensors.pieces(name))
    return str(np.frombuffer(piece[: spec.itemsize], numpy_dtype(spec.dtype))[0])
