"""Reference logits kept in a safetensors file, and the proof of which checkpoint they belong to.

A golden file lets a machine check a conversion without the memory for the reference model. It holds
`ids.N` [positions] int32 and `logits.N` [positions vocab] float32 for each sequence; the rest is
JSON in the file's metadata. Logits are written slice by slice and read slice by slice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_convert.errors import SourceError, TargetError, short
from gemma_convert.files.json_file import parse_json, read_regular
from gemma_convert.files.library_path import library_path
from gemma_convert.files.new_file import new_sibling
from gemma_convert.logits.reference import Reference, reference_config
from gemma_convert.logits.sizes import check_sizes
from gemma_convert.model.config import MAX_CONFIG_BYTES, read_architecture
from gemma_convert.prompts.text import TokenSequence, token_sequences
from gemma_convert.stores.remote.locations import local

FORMAT = "gemma-convert/golden/1"
SLICE_BYTES = 64 << 20

_KEY = "gemma-convert"
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
        found = _sha256(hf / "config.json")
        if found != self.config_sha256:
            raise self._foreign(hf / "config.json", f"sha256 {self.config_sha256}", found)
        weights = weight_files(hf)
        if weights and weights != self.weights:
            wanted = {file.name: file for file in self.weights}
            other = [file.name for file in weights if wanted.get(file.name) != file]
            other += sorted(set(wanted).difference(file.name for file in weights))
            raise self._foreign(hf, "the weight files they were computed from", ", ".join(other))

    def _foreign(self, where: Path, expected: str, found: str) -> SourceError:
        return SourceError(
            f"The golden logits in {self.path} are those of another checkpoint.",
            where=where,
            expected=expected,
            found=found[:500],
            do="save golden logits of this checkpoint",
        )


def weight_files(hf: Path) -> tuple[WeightFile, ...]:
    """Identity of each safetensors file in `hf`, by name; empty where there is none."""
    return tuple(_weight_file(path) for path in sorted(hf.glob("*.safetensors")) if path.is_file())


def save_golden(
    hf: str | Path,
    path: str | Path,
    *,
    prompts: Sequence[str] = (),
    tokens: int | None = None,
    overwrite: bool = False,
) -> Golden:
    """The golden file `path` with transformers' float32 logits of the checkpoint in `hf`.

    It appears under its name only when complete. Raises TargetError where `path` exists already or
    cannot be written, and SourceError where the checkpoint cannot be run.
    """
    path = Path(path)
    _check_target(path, overwrite)
    with ExitStack() as stack:
        folder = local(hf, stack, whole=True)
        architecture = read_architecture(folder)
        check_sizes(folder, architecture)
        reference_config(folder, architecture)
        sequences = token_sequences(folder, architecture, prompts, tokens)
        facts = _facts(folder, sequences)
        reference = Reference(folder)
    try:
        _write(path, facts, sequences, reference, overwrite=overwrite)
    except OSError as error:
        raise TargetError(
            "The golden file cannot be written.", where=path, found=error.strerror or error
        ) from error
    return load_golden(path)


def _facts(hf: Path, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "family": read_architecture(hf).family,
        "config_sha256": _sha256(hf / "config.json"),
        "weights": [asdict(file) for file in weight_files(hf)],
        "versions": {name: version(name) for name in ("transformers", "torch")},
        "sequences": [{"name": one.name, "pieces": one.pieces} for one in sequences],
    }


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


def _check_target(path: Path, overwrite: bool) -> None:
    if os.path.lexists(path):
        if not overwrite:
            raise TargetError("The golden file exists already.", where=path, do="add --overwrite")
        if path.is_symlink() or not path.is_file() or not _is_golden(path):
            raise TargetError(
                "What stands there is no golden file, so it is not replaced.",
                where=path,
                do="choose another name, or remove it yourself",
            )
    if not path.parent.is_dir():
        raise TargetError("The folder of the golden file does not exist.", where=path.parent)


def _is_golden(path: Path) -> bool:
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
    facts = parse_json((file.metadata() or {}).get(_KEY, "null").encode())
    return facts if isinstance(facts, dict) else {}


def _write(
    path: Path,
    facts: dict[str, Any],
    sequences: Sequence[TokenSequence],
    reference: Reference,
    *,
    overwrite: bool,
) -> None:
    vocab = reference.architecture.text.vocab
    rows = max(1, SLICE_BYTES // (4 * vocab))
    descriptor, partial = new_sibling(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_header(facts, sequences, vocab))
            for sequence in sequences:
                file.write(np.array(sequence.ids, "<i4").tobytes())
            for sequence in sequences:
                for logits in reference.logits(sequence.ids, rows):
                    file.write(np.ascontiguousarray(logits, "<f4").data)
            file.flush()
            os.fsync(file.fileno())
        _check_target(path, overwrite)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _header(facts: dict[str, Any], sequences: Sequence[TokenSequence], vocab: int) -> bytes:
    """The safetensors header: its length in 8 bytes, then JSON padded with spaces to 8 bytes."""
    lengths = [len(sequence.ids) for sequence in sequences]
    entries: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(facts)}}
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


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(read_regular(path, path.name, MAX_CONFIG_BYTES)).hexdigest()
    except FileNotFoundError as error:
        raise SourceError("A file cannot be read.", where=path, found=error.strerror) from None
