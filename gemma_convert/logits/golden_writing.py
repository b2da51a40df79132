"""Golden files made: the original runs layer by layer, then its logits by slices of the vocabulary.

Each slice goes to its columns of the file at once. So what is in memory is a layer, the hidden
states, and one slice of logits, whatever the model, the positions and the vocabulary are.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gemma_convert.api.arguments import public
from gemma_convert.errors import TargetError
from gemma_convert.files.new_file import new_sibling
from gemma_convert.files.read_once import reading_once
from gemma_convert.forward.native_model import Logits
from gemma_convert.logits.golden import (
    FORMAT,
    KEY,
    Golden,
    config_sha256,
    is_golden,
    load_golden,
    weight_files,
)
from gemma_convert.logits.layerwise import LayerwiseReference
from gemma_convert.logits.reference import reference_config
from gemma_convert.logits.sizes import check_sizes
from gemma_convert.logits.streaming import compared_slices
from gemma_convert.logits.watched import Watched
from gemma_convert.model.architecture import TextArchitecture
from gemma_convert.model.config import read_architecture
from gemma_convert.progress import Listener, ended
from gemma_convert.prompts.text import TokenSequence, token_sequences
from gemma_convert.stores.remote.locations import local


@public
def save_golden(
    hf: str | Path,
    path: str | Path,
    *,
    prompts: Sequence[str] = (),
    tokens: int | None = None,
    overwrite: bool = False,
    progress: Listener | None = None,
) -> Golden:
    """Saves the float32 logits of transformers for the checkpoint `hf` in the golden file `path`.

    The file appears under its name only when it is complete. `progress` is called with a
    `ProgressEvent` for each layer and each slice of the logits. Raises TargetError where `path`
    exists already or cannot be written, and SourceError where the checkpoint cannot be run.
    """
    path = Path(path)
    _check_target(path, overwrite)
    with ExitStack() as stack, reading_once():
        folder = local(hf, stack, whole=True)
        architecture = read_architecture(folder)
        check_sizes(folder, architecture)
        reference_config(folder, architecture)
        sequences = token_sequences(folder, architecture, prompts, tokens)
        facts = _facts(folder, sequences)
        run = LayerwiseReference(folder, sequences)
        listener = stack.enter_context(ended(progress))
        reference = Watched(run, len(architecture.text.layers), listener)
        try:
            _write(path, facts, sequences, reference, architecture.text, overwrite=overwrite)
        except OSError as error:
            raise TargetError(
                "The golden file cannot be written.", where=path, found=error.strerror or error
            ) from error
    return load_golden(path)


def _facts(hf: Path, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "family": read_architecture(hf).family,
        "config_sha256": config_sha256(hf),
        "weights": [asdict(file) for file in weight_files(hf)],
        "versions": {name: version(name) for name in ("transformers", "torch")},
        "sequences": [{"name": one.name, "pieces": one.pieces} for one in sequences],
    }


def _check_target(path: Path, overwrite: bool) -> None:
    if os.path.lexists(path):
        if not overwrite:
            raise TargetError("The golden file exists already.", where=path, do="add --overwrite")
        if path.is_symlink() or not path.is_file() or not is_golden(path):
            raise TargetError(
                "The target exists and is not a golden file, so --overwrite does not replace it.",
                where=path,
                do="choose another name, or remove it yourself",
            )
    if not path.parent.is_dir():
        raise TargetError("The folder of the golden file does not exist.", where=path.parent)


def _write(
    path: Path,
    facts: dict[str, Any],
    sequences: Sequence[TokenSequence],
    reference: Watched,
    text: TextArchitecture,
    *,
    overwrite: bool,
) -> None:
    """The file of what `reference` gives, which has not run yet."""
    slices = compared_slices(sequences, vocab=text.vocab, embed=text.embed)
    descriptor, partial = new_sibling(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_header(facts, sequences, text.vocab))
            for sequence in sequences:
                file.write(np.array(sequence.ids, "<i4").tobytes())
            file.flush()
            start = file.tell()
            for _ in reference.stages():
                pass
            for part, logits in zip(slices, reference.logits(slices), strict=True):
                _write_columns(descriptor, start, logits, part, text.vocab)
            os.fsync(descriptor)
        _check_target(path, overwrite)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_columns(descriptor: int, start: int, logits: Logits, part: slice, vocab: int) -> None:
    """The columns `part` of an array [positions vocab] of float32 that begins at byte `start`.

    All sequences' rows are one such array, since their logits stand one behind the other.
    """
    for row, values in enumerate(np.ascontiguousarray(logits, "<f4")):
        left, at = values.data.cast("B"), start + 4 * (row * vocab + part.start)
        while left:
            count = os.pwrite(descriptor, left, at)
            left, at = left[count:], at + count


def _header(facts: dict[str, Any], sequences: Sequence[TokenSequence], vocab: int) -> bytes:
    """The safetensors header: its length in 8 bytes, then JSON padded with spaces to 8 bytes."""
    lengths = [len(sequence.ids) for sequence in sequences]
    entries: dict[str, Any] = {"__metadata__": {KEY: json.dumps(facts)}}
    offset = 0
    for kind, dtype, row in (("ids", "I32", []), ("logits", "F32", [vocab])):
        for index, length in enumerate(lengths):
            end = offset + 4 * math.prod([length, *row])
            shape = [length, *row]
            entries[f"{kind}.{index}"] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
