"""The native side of a check: a checkpoint of any layout, run as its framework lays it out.

Trees are read by Orbax and files by safetensors; nothing here knows our mapping tables or stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_convert.errors import UsageError
from gemma_convert.logits.limit import Dtype
from gemma_convert.logits.prompts import TokenSequence
from gemma_convert.logits.soft import SoftSequence
from gemma_convert.logits.streaming import Streamed
from gemma_convert.model.architecture import Architecture
from gemma_convert.stores.orbax.reader import find_items

Logits: TypeAlias = npt.NDArray[np.float32]

FAST_LLM_METADATA = "metadata.yaml"


class LogitSource(Protocol):
    """A side of the comparison: logits of a sequence in slices [positions vocab]."""

    @property
    def device(self) -> str:
        """Name of the device, for the report."""

    def slices(self, index: int, rows: int) -> Iterator[Logits]:
        """Logits of one sequence, at most `rows` positions at a time."""


class NativeModel(Protocol):
    """A native checkpoint that fits a model's config.json."""

    folder: Path
    layout: str
    libraries: tuple[str, ...]
    dtypes: frozenset[str]
    """Dtypes that its arrays have."""
    scaled_dtype: str | None
    """Dtype of an embedding that is stored × √embed; None where it is stored as it is."""
    towers: frozenset[str]
    """Towers that it holds: vision, audio."""

    def run(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> LogitSource:
        """The logits of `sequences`, of the whole model in memory.

        `check_towers` must have passed. Weights are dropped once the hidden states are known.
        """

    def stream(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> Streamed:
        """The same, layer by layer: a layer's weights are read when it runs, and dropped."""


def check_towers(model: NativeModel, sequences: Sequence[TokenSequence]) -> None:
    """Nothing where `model` sees and hears what is in `sequences`. Raises UsageError else."""
    for sequence in sequences:
        if isinstance(sequence, SoftSequence) and sequence.medium.tower not in model.towers:
            medium = sequence.medium
            raise UsageError(
                f"The native checkpoint is without the {medium.tower} tower, so it "
                f"{medium.senses} no {medium.many}.",
                where=model.folder,
                found=f"layout {model.layout}",
                do=f"leave out {medium.option}, or convert with the tower, to a layout that has it",
            )


def open_model(native: Path, architecture: Architecture) -> NativeModel:
    """The checkpoint at `native`; raises SourceError where it does not fit `architecture`."""
    from gemma_convert.logits.native_fast_llm import FastLLMModel
    from gemma_convert.logits.native_jax import jax_model

    if (native / FAST_LLM_METADATA).is_file():
        return FastLLMModel(native, architecture)
    return jax_model(find_items(native), architecture)


def device_count(model: NativeModel) -> int:
    """How many devices, of all processes, `model` runs on; Fast-LLM's run on one."""
    import jax

    from gemma_convert.logits.native_jax import JaxModel

    return jax.device_count() if isinstance(model, JaxModel) else 1


def follow(
    model: NativeModel,
    sequences: Sequence[TokenSequence],
    dtype: Dtype,
    whole_model: bool,
    *,
    rows: int,
    vocab: Sequence[slice],
) -> None:
    """Takes part in a check that process 0 leads: the same calls of JAX, in the same order.

    `rows` and `vocab` are the slices of logits that process 0 compares, of a whole model and of a
    streamed one. A model of Fast-LLM runs in process 0 alone.
    """
    from gemma_convert.logits.native_jax import JaxModel

    if not isinstance(model, JaxModel):
        return
    if whole_model:
        ours = model.run(sequences, dtype)
        for index in range(len(sequences)):
            _exhaust(ours.slices(index, rows))
    else:
        stream = model.stream(sequences, dtype)
        _exhaust(stream.stages())
        _exhaust(stream.logits(vocab))


def _exhaust(items: Iterable[object]) -> None:
    for _ in items:
        pass
