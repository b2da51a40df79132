"""Reference logits kept in a safetensors file, and the proof of which checkpoint they belong to.

A golden file lets a machine check a conversion without the memory for the reference model. It holds
`ids.N` [positions] int32 and `logits.N` [positions vocab] float32 for each sequence; the rest is
JSON in the file's metadata. `golden_writing` makes it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_convert.errors import SourceError, short
from gemma_convert.files.json_file import parse_json, read_regular
from gemma_convert.files.library_path import library_path
from gemma_convert.model.config import MAX_CONFIG_BYTES
from gemma_convert.model.huggingface_files import CONFIG
from gemma_convert.prompts.text import TokenSequence

FORMAT = "gemma-convert/golden/1"
SLICE_BYTES = 64 << 20

KEY = "gemma-convert"
"""Where the facts stand in the file's metadata."""

_FORMATS = "gemma-convert/golden/"
_SAMPLES = 64
_SAMPLE_BYTES = 64 << 10
_MAX_HEADER = 100 << 20
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)

MAX_POSITIONS = 1 << 22
"""Of one sequence: its ids are held in memory."""


@dataclass(frozen=True)
class WeightFile:
    """What tells one weight file from another without reading it whole.

    `header` is the sha256 of the safetensors header, `samples` that of 64 pieces spread evenly over
    the file: fine-tuned weights have the same header.
    """

    name: str
    size: int
    header: str
    samples: str


@dataclass(frozen=True)
class Golden:
    """Reference logits in a golden file; `slices` reads them."""

    path: Path
    family: str
    config_sha256: str
    weights: tuple[WeightFile, ...]
    versions: dict[str, str]
    sequences: tuple[TokenSequence, ...]
    vocab: int

    @property
    def device(self) -> str:
        """Where the logits come from, in the place of a device's name."""
        return "file"

    def slices(self, index: int, rows: int) -> Iterator[npt.NDArray[np.float32]]:
        """Logits of one sequence, at most `rows` positions at a time, [positions vocab] each."""
        from safetensors import safe_open

        with safe_open(library_path(self.path), framework="numpy") as file:
            stored = file.get_slice(f"logits.{index}")
            length = len(self.sequences[index].ids)
            for start in range(0, length, rows):
                yield stored[start : min(start + rows, length)]

    def check_belongs(self, hf: Path) -> None:
        """Nothing where `hf` is the checkpoint that these logits were computed from.

        Its weights are compared where they are there. Raises SourceError else.
        """
        found = config_sha256(hf)
        if found != self.config_sha256:
            raise self._foreign(hf / CONFIG, f"sha256 {self.config_sha256}", found)
        weights = weight_files(hf)
        if weights and weights != self.weights:
            wanted = {file.name: file for file in self.weights}
            other = [file.name for file in weights if wanted.get(file.name) != file]
            other += sorted(set(wanted).difference(file.name for file in weights))
            raise self._foreign(hf, "the weight files they were computed from", ", ".join(other))

    def _foreign(self, where: Path, expected: str, found: str) -> SourceError:
        return SourceError(
            f"The golden logits in {self.path} belong to another checkpoint.",
            where=where,
            expected=expected,
            found=found[:500],
            do="save golden logits of this checkpoint",
        )


def weight_files(hf: Path) -> tuple[WeightFile, ...]:
    """Identity of each safetensors file in `hf`, by name; empty where there is none."""
    return tuple(_weight_file(path) for path in sorted(hf.glob("*.safetensors")) if path.is_file())


def config_sha256(hf: Path) -> str:
    """The sha256 of the config.json in `hf`; SourceError where there is none."""
    path = hf / CONFIG
    try:
        return hashlib.sha256(read_regular(path, CONFIG, MAX_CONFIG_BYTES)).hexdigest()
    except FileNotFoundError as error:
        raise SourceError("A file cannot be read.", where=path, found=error.strerror) from None


def load_golden(path: Path) -> Golden:
    """The golden file `path`, its logits still on disk.

    Raises SourceError where it is no golden file, or one of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    if path.exists() and not path.is_file():
        raise SourceError("The golden file is not a file.", where=path)
    try:
        with safe_open(library_path(path), framework="numpy") as file:
            facts = _noted(file)
            if facts.get("format") != FORMAT:
                raise SourceError(
                    "This is not a file of golden logits that this version can read.",
                    where=path,
                    expected=FORMAT,
                    found=short(facts.get("format")),
                )
            return _parse(path, facts, file)
    except (OSError, SafetensorError, *_MALFORMED) as error:
        raise SourceError(
            "The golden file cannot be read.", where=path, found=str(error)[:500]
        ) from error


def _parse(path: Path, facts: dict[str, Any], file: Any) -> Golden:
    sequences, vocabs = [], set()
    for index, one in enumerate(facts["sequences"]):
        rows, vocab = _shape(file, f"logits.{index}", "F32")
        if _shape(file, f"ids.{index}", "I32") != [rows] or not rows <= MAX_POSITIONS:
            raise ValueError(f"sequence {index} has {rows} rows of logits and other ids")
        ids = file.get_tensor(f"ids.{index}")
        pieces = None if one["pieces"] is None else tuple(map(str, one["pieces"]))
        if pieces is not None and len(pieces) != rows:
            raise ValueError(f"sequence {index} has {rows} rows for {len(pieces)} pieces")
        if rows and not 0 <= ids.min() <= ids.max() < vocab:
            raise ValueError(f"sequence {index} has ids beyond the vocabulary of {vocab}")
        sequences.append(TokenSequence(str(one["name"]), tuple(ids.tolist()), pieces))
        vocabs.add(vocab)
    if len(vocabs) != 1:
        raise ValueError(f"vocabularies {sorted(vocabs)}")
    return Golden(
        path=path,
        family=str(facts["family"]),
        config_sha256=str(facts["config_sha256"]),
        weights=tuple(WeightFile(**one) for one in facts["weights"]),
        versions={str(name): str(value) for name, value in facts["versions"].items()},
        sequences=tuple(sequences),
        vocab=vocabs.pop(),
    )


def _shape(file: Any, name: str, dtype: str) -> list[int]:
    """The shape of a tensor of that dtype; ValueError where it has another."""
    part = file.get_slice(name)
    if part.get_dtype() != dtype:
        raise ValueError(f"{name} is {part.get_dtype()} instead of {dtype}")
    return list(part.get_shape())


def is_golden(path: Path) -> bool:
    """Whether a file is empty, or one of golden logits of whatever version."""
    from safetensors import SafetensorError, safe_open

    if not path.stat().st_size:
        return True
    try:
        with safe_open(library_path(path), framework="numpy") as file:
            return str(_noted(file).get("format")).startswith(_FORMATS)
    except (OSError, SafetensorError, *_MALFORMED):
        return False


def _noted(file: Any) -> dict[str, Any]:
    """What the metadata of an open file says of golden logits; empty where that is nothing."""
    facts = parse_json((file.metadata() or {}).get(KEY, "null").encode())
    return facts if isinstance(facts, dict) else {}


def _weight_file(path: Path) -> WeightFile:
    try:
        return _identify(path)
    except OSError as error:
        raise SourceError("A file cannot be read.", where=path, found=error.strerror) from None


def _identify(path: Path) -> WeightFile:
    size = path.stat().st_size
    samples = hashlib.sha256()
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if length > min(size, _MAX_HEADER):
            raise SourceError("This is not a safetensors file.", where=path)
        header = hashlib.sha256(file.read(length)).hexdigest()
        for number in range(_SAMPLES):
            file.seek(size * number // _SAMPLES)
            samples.update(file.read(_SAMPLE_BYTES))
    return WeightFile(path.name, size, header, samples.hexdigest())
