"""Both sides are run on the same tokens, whole or layer by layer, and their logits compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gemma_convert.engine.joined import process_count
from gemma_convert.forward.native_model import ComparedModel, Dtype, LogitSource
from gemma_convert.logits.divergence import Accumulator
from gemma_convert.logits.drift import TOLERANCE, Drift, drift_of
from gemma_convert.logits.golden import SLICE_BYTES, Golden
from gemma_convert.logits.layerwise import LayerwiseReference
from gemma_convert.logits.local import LocalRun
from gemma_convert.logits.opened import Opened
from gemma_convert.logits.part_check import LocalCheck
from gemma_convert.logits.reference import TransformersLogits
from gemma_convert.logits.sides import Sides
from gemma_convert.logits.streaming import (
    GoldenSlices,
    compare_slices,
    compared_slices,
    run_in_step,
    summed,
)
from gemma_convert.logits.towers import check_each_part
from gemma_convert.logits.watched import Watched
from gemma_convert.model.architecture import Architecture
from gemma_convert.progress import Listener, steps
from gemma_convert.prompts.text import TokenSequence


@dataclass(frozen=True)
class Run:
    """What both sides gave: their logits compared, and, where they ran in step, each part."""

    compared: Accumulator
    drift: Drift | None
    local: LocalCheck | None
    noise_floor: float | None
    reference_device: str
    native_device: str
    known: tuple[str, ...] = ()
    """What the framework is known to compute otherwise, in words."""


def run_streamed(
    sides: Sides,
    golden: Golden | None,
    side: Opened,
    sequences: Sequence[TokenSequence],
    dtype: Dtype,
    architecture: Architecture,
    exact: bool,
    progress: Listener | None,
) -> Run:
    """Layer by layer; where this process has both sides to itself, each layer also by itself.

    `exact` says that the native checkpoint holds no rounded values.
    """
    noise = dtype if exact else "bfloat16"
    text, native = architecture.text, side.native
    tolerance = TOLERANCE if noise == "float32" else None
    if golden is not None or process_count() > 1 or native is None:
        other = (
            LayerwiseReference(sides.hf, sequences, sides.changes)
            if golden is None
            else GoldenSlices(golden)
        )
        staged = Watched(side.model.stream(sequences, dtype), len(text.layers), progress)
        drift = run_in_step(other, staged, tolerance)
        compared = compare_slices(other, staged, sequences, vocab=text.vocab, embed=text.embed)
        return Run(compared, drift, None, None, other.device, staged.device)
    reference = LayerwiseReference(sides.hf, sequences, sides.changes)
    ours = Watched(native.stream(sequences, dtype), len(text.layers), progress)
    of_towers: Dtype = "float32" if exact else "bfloat16"  # they are never run in another dtype
    towers = check_each_part(reference, native.towers, sequences, of_towers)
    run = LocalRun(reference, ours, sequences, noise, towers.soft_errors)
    drift = drift_of(run.stages(), tolerance)
    slices = compared_slices(sequences, vocab=text.vocab, embed=text.embed)
    compared = summed(run.logits(slices), sequences)
    local = run.result()
    local = replace(local, parts=(*towers.parts, *local.parts))
    floor = run.noise_floor if local.passed else None  # of a mistake it would be no noise
    if local.passed:
        compared.count_tied(run.tied)
    return Run(compared, drift, local, floor, reference.device, ours.device, towers.known)


def run_whole(
    sides: Sides,
    golden: Golden | None,
    model: ComparedModel,
    sequences: Sequence[TokenSequence],
    dtype: Dtype,
    architecture: Architecture,
    progress: Listener | None,
) -> Run:
    reference: LogitSource = (
        TransformersLogits(sides.hf, sequences, sides.changes) if golden is None else golden
    )
    ours = model.run(sequences, dtype)
    compared = _compared(reference, ours, sequences, architecture.text.vocab, progress)
    return Run(compared, None, None, None, reference.device, ours.device)


def _compared(
    reference: LogitSource,
    native: LogitSource,
    sequences: Sequence[TokenSequence],
    vocab: int,
    progress: Listener | None,
) -> Accumulator:
    rows = slice_rows(vocab)
    total = Accumulator()
    names = [one.name for one in sequences]
    for index, sequence in enumerate(steps(progress, "logits", "sequences", sequences, names)):
        start = 0
        sides = zip(reference.slices(index, rows), native.slices(index, rows), strict=True)
        for expected, found in sides:
            end = start + len(expected)
            total.add(
                expected,
                found,
                sequence=sequence.name,
                start=start,
                ids=sequence.ids[start:end],
                pieces=None if sequence.pieces is None else sequence.pieces[start:end],
                compared=sequence.compared[start:end],
            )
            start = end
    return total


def slice_rows(vocab: int) -> int:
    """Positions of one slice of a whole model's logits."""
    return max(1, SLICE_BYTES // (4 * vocab))
