"""Does a native checkpoint compute what the original does? Both are run and their logits compared.

The native tree is read by Orbax and run by `native.maxtext`; neither knows our mapping tables.
The reference is transformers on the original checkpoint, or golden logits saved from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_convert.architecture import Architecture, TextArchitecture
from gemma_convert.config import read_architecture
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.logits.divergence import Accumulator, Divergence
from gemma_convert.logits.golden import SLICE_BYTES, Golden, load_golden
from gemma_convert.logits.limit import Dtype, choose_limit, find_lossy_rows
from gemma_convert.logits.prompts import TokenSequence, check_ids, token_sequences
from gemma_convert.logits.reference import TransformersLogits
from gemma_convert.logits.report import LogitReport
from gemma_convert.native.restore import TEXT_MODULES, maxtext_facts, restore_maxtext
from gemma_convert.native.shapes import check_shapes
from gemma_convert.stores.orbax_reader import find_items

if TYPE_CHECKING:
    import jax

Logits: TypeAlias = npt.NDArray[np.float32]

_BUCKET = 64
_BATCH_TOKENS = 4096


class LogitSource(Protocol):
    """A side of the comparison: logits of a sequence in slices [positions vocab]."""

    @property
    def device(self) -> str:
        """Name of the device, for the report."""

    def slices(self, index: int, rows: int) -> Iterator[Logits]:
        """Logits of one sequence, at most `rows` positions at a time."""


def logit_check(
    hf: Path,
    native: Path,
    *,
    max_kl: float | None = None,
    prompts: Sequence[str] = (),
    tokens: int | None = None,
    dtype: Dtype = "float32",
    golden: Path | None = None,
    lossy_rows: Sequence[str] | None = None,
) -> LogitReport:
    """The report on whether the MaxText checkpoint `native` computes what `hf` does.

    With `golden`, `hf` need hold config.json alone, and the sequences are the golden file's.
    `lossy_rows` names what the conversion rounded; None finds out. `max_kl` is in nats per token.
    Raises SourceError where a side cannot be read or the two do not fit, UsageError for options
    that contradict each other.
    """
    started = time.monotonic()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks on one device
    if golden is not None and (prompts or tokens is not None):
        raise UsageError("A golden file has its own tokens.", do="leave out prompts and --tokens")
    architecture = read_architecture(hf)
    items = find_items(native)
    facts = maxtext_facts(items)
    check_shapes(facts, architecture.text, items)
    if lossy_rows is None:
        lossy_rows = find_lossy_rows(native, items, facts, architecture)
    limit = choose_limit(max_kl, dtype, lossy_rows)
    stored = None if golden is None else _matching_golden(golden, hf, architecture)
    reference: LogitSource
    if stored is None:
        sequences = token_sequences(hf, architecture, prompts, tokens)
        reference = TransformersLogits(hf, sequences)
    else:
        sequences, reference = list(stored.sequences), stored
    ours = NativeLogits(items, architecture.text, sequences, dtype)
    divergence = _diverge(reference, ours, sequences, architecture.text.vocab)
    longest, window = max(len(one.ids) for one in sequences), architecture.text.window
    return LogitReport(
        passed=divergence.within(limit.kl),
        proof=limit.proof,
        limit=limit.kl,
        limit_reason=limit.reason,
        divergence=divergence,
        sequences=len(sequences),
        longest_sequence=longest,
        sliding_window=window,
        dtype=dtype,
        reference="transformers" if stored is None else f"golden logits {stored.path.name}",
        reference_device=reference.device,
        native_device=ours.device,
        versions=_versions(stored),
        seconds=time.monotonic() - started,
        lossy_rows=tuple(lossy_rows),
        warnings=(*limit.warnings, *_window_warning(longest, window)),
    )


class NativeLogits:
    """Logits of a MaxText checkpoint; the tree is dropped once the hidden states are known."""

    def __init__(
        self, items: Path, text: TextArchitecture, sequences: Sequence[TokenSequence], dtype: Dtype
    ) -> None:
        from gemma_convert.native.maxtext import final_hidden, output_table

        self._text = text
        self._lengths = [len(sequence.ids) for sequence in sequences]
        tree = restore_maxtext(items, TEXT_MODULES)
        groups = _batches(self._lengths)
        tokens: list[Any] = [_padded([sequences[index].ids for index in group]) for group in groups]
        hidden = final_hidden(tree, text, tokens, dtype)
        self._hidden: dict[int, jax.Array] = {
            index: states[row]
            for group, states in zip(groups, hidden, strict=True)
            for row, index in enumerate(group)
        }
        self._table = output_table(tree, text, dtype)

    @property
    def device(self) -> str:
        """Name of the first device that JAX runs on."""
        import jax

        device = jax.devices()[0]
        return str(device.device_kind)

    def slices(self, index: int, rows: int) -> Iterator[Logits]:
        """Logits of one sequence, at most `rows` positions at a time, [positions vocab] each."""
        from gemma_convert.native.arithmetic import head

        length = self._lengths[index]
        for start in range(0, length, rows):
            hidden = self._hidden[index][None, start : start + rows]
            yield np.asarray(head(self._table, hidden, self._text))[0, : length - start]


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the sequences that run together: those of one padded length, a bounded number."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(-(-length // _BUCKET) * _BUCKET, []).append(index)
    return [
        group[start : start + max(1, _BATCH_TOKENS // padded)]
        for padded, group in groups.items()
        for start in range(0, len(group), max(1, _BATCH_TOKENS // padded))
    ]


def _padded(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """Ids [batch length], filled up with each row's last id, which no earlier position can see."""
    length = -(-max(map(len, rows)) // _BUCKET) * _BUCKET
    filled = [[*row, *[row[-1]] * (length - len(row))] for row in rows]
    return np.array(filled, np.int32)


def _diverge(
    reference: LogitSource, native: LogitSource, sequences: Sequence[TokenSequence], vocab: int
) -> Divergence:
    rows = max(1, SLICE_BYTES // (4 * vocab))
    total = Accumulator()
    for index, sequence in enumerate(sequences):
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
            )
            start = end
    return total.result()


def _matching_golden(path: Path, hf: Path, architecture: Architecture) -> Golden:
    golden = load_golden(path)
    golden.check_belongs(hf)
    if golden.vocab != architecture.text.vocab:
        raise SourceError(
            "The golden logits are for another vocabulary.",
            where=path,
            expected=architecture.text.vocab,
            found=golden.vocab,
        )
    for sequence in golden.sequences:
        check_ids(sequence, architecture, path)
    return golden


def _window_warning(longest: int, window: int) -> tuple[str, ...]:
    if longest > window:
        return ()
    return (
        f"No sequence is longer than the sliding window ({longest} of {window} tokens): a wrong "
        "window would not be seen.",
    )


def _versions(golden: Golden | None) -> dict[str, str]:
    names = ["gemma-convert", "jax", "orbax-checkpoint", "numpy"]
    found = {} if golden is None else dict(golden.versions)
    for name in names if golden is not None else [*names, "transformers", "torch"]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
