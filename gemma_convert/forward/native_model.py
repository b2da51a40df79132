"""What a check asks of a native checkpoint that can be run, whatever its layout.

Nothing here knows a mapping table: a forward pass that went through one would agree with its
mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from gemma_convert.errors import UsageError
from gemma_convert.forward.encoder import Encoder
from gemma_convert.forward.parts import Part
from gemma_convert.prompts.batches import by_sequence, filled
from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.text import TokenSequence

T = TypeVar("T")

Dtype: TypeAlias = Literal["float32", "bfloat16"]
"""What a model computes in."""

Logits: TypeAlias = npt.NDArray[np.floating[Any]]
"""Logits [positions vocab], or of a part of the positions or of the vocabulary."""

States: TypeAlias = Sequence[npt.NDArray[Any]]
"""The hidden state [length embed] of each sequence."""


class LogitSource(Protocol):
    """A side of the comparison: logits of a sequence in slices [positions vocab]."""

    @property
    def device(self) -> str:
        """Name of the device, for the report."""

    def slices(self, index: int, rows: int) -> Iterator[Logits]:
        """Logits of one sequence, at most `rows` positions at a time."""


class VocabularySlices(Protocol):
    """A side whose logits can be had by slices of the vocabulary."""

    @property
    def device(self) -> str:
        """Name of the device, for the report."""

    def logits(self, vocab: Sequence[slice]) -> Iterator[Logits]:
        """Logits [positions width] of each slice, of all sequences' compared positions in order."""


@dataclass
class Given:
    """What the reference has, which each part of a native model is run on beside its own.

    Before a stage, `inputs` are the states that lead to it, None where none do, and `parts` what
    its parts make, [length features] of each sequence. After it, `made` has what the native parts
    make when each is given the reference's. `rows` [positions embed] go through the head as well.
    """

    inputs: States | None = None
    parts: Sequence[Mapping[Part, npt.NDArray[Any]]] = ()
    made: Sequence[Mapping[Part, npt.NDArray[Any]]] = ()
    rows: Logits | None = None


class Batched(Generic[T]):
    """What is given as the batches of a model hold it, and what came of it by sequence again.

    `placed` makes the model's own array of one on the host, and `fetched` the reverse.
    """

    def __init__(
        self,
        given: Given,
        groups: Sequence[Sequence[int]],
        sequences: Sequence[TokenSequence],
        placed: Callable[[npt.NDArray[Any]], T],
        fetched: Callable[[T], npt.NDArray[Any]],
    ) -> None:
        """`groups` are the numbers of the sequences that each batch holds, row by row."""
        self._given, self._groups, self._sequences = given, groups, sequences
        self._placed, self._fetched = placed, fetched

    @property
    def inputs(self) -> list[T]:
        """The states that lead to the stage that runs next, [batch length embed]."""
        states = self._given.inputs
        if states is None:
            raise ValueError("nothing was given for this stage")
        return [self._placed(filled([states[n] for n in group])) for group in self._groups]

    @property
    def parts(self) -> list[dict[Part, T]]:
        """What the parts of that stage make, [batch length features]."""
        return [
            {
                part: self._placed(filled([self._given.parts[n][part] for n in group]))
                for part in self._given.parts[group[0]]
            }
            for group in self._groups
        ]

    def give_back(self, made: Sequence[Mapping[Part, T]]) -> None:
        """Gives what the parts of a stage made of what was given, [batch length *features]."""
        found: list[dict[Part, npt.NDArray[Any]]] = [{} for _ in self._sequences]
        for part in made[0]:
            states = [self._fetched(one[part]) for one in made]
            flat = [state.reshape(*state.shape[:2], -1) for state in states]
            for one, row in zip(
                found, by_sequence(flat, self._groups, self._sequences), strict=True
            ):
                one[part] = row
        self._given.made = found


class Staged(VocabularySlices, Protocol):
    """A side that is run layer by layer; `stages` must have come to its end before `logits`."""

    def stages(self) -> Iterator[States]:
        """The states of each sequence: embedded, behind each layer, and behind the final norm."""


class Streamed(VocabularySlices, Protocol):
    """One whose parts may be run by themselves, each on what the reference gives it."""

    def stages(self, given: Given | None = None) -> Iterator[States]:
        """The states of each sequence: embedded, behind each layer, and behind the final norm.

        With `given` each part of a stage is run on what the reference gives it, too. The head is
        then given its rows behind the compared positions.
        """


class ComparedModel(Protocol):
    """A checkpoint that is compared with the original, whoever runs it."""

    folder: Path
    layout: str
    libraries: tuple[str, ...]
    """Packages that it is run with, for the report."""
    dtypes: frozenset[str]
    """Dtypes that its arrays have."""
    scaled_dtype: str | None
    """Dtype of an embedding that is stored × √embed; None where it is stored as it is."""

    @property
    def towers(self) -> Collection[str]:
        """The towers that it holds: vision or audio."""

    @property
    def device_count(self) -> int:
        """How many devices, of all processes, it runs on."""

    def run(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> LogitSource:
        """The logits of `sequences`, of the whole model in memory.

        `check_towers` must have passed. Weights are dropped once the hidden states are known.
        """

    def stream(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> Staged:
        """The same, layer by layer: a layer's weights are read when it runs, and dropped."""


class NativeModel(ComparedModel, Protocol):
    """A native checkpoint that fits a model's config.json, run by its layout's forward pass."""

    @property
    def towers(self) -> Mapping[str, Callable[[SoftSequence], Encoder]]:
        """Towers that it holds, vision or audio, and what gives the steps of each for a prompt."""

    def stream(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> Streamed: ...

    def follow(
        self,
        sequences: Sequence[TokenSequence],
        dtype: Dtype,
        whole_model: bool,
        *,
        rows: int,
        vocab: Sequence[slice],
    ) -> None:
        """Takes part in a check that process 0 leads, where the model runs in all processes.

        `rows` and `vocab` are the slices of logits that process 0 compares, of a whole model and of
        a streamed one.
        """


def check_towers(model: ComparedModel, sequences: Sequence[TokenSequence]) -> None:
    """Raises UsageError where `model` has no tower for an image or a sound in `sequences`."""
    for sequence in sequences:
        if isinstance(sequence, SoftSequence) and sequence.medium.tower not in model.towers:
            medium = sequence.medium
            raise UsageError(
                f"The native checkpoint has no {medium.tower} tower, so it cannot take "
                f"{medium.many}.",
                where=model.folder,
                found=f"layout {model.layout}",
                do=f"leave out {medium.option}, or convert with the tower, to a layout that has it",
            )
