"""Reads one JSON file of a checkpoint strictly, whatever it turns out to be.

What Python's own reader would let pass is refused: a key that stands twice (readers differ in which
value they take), NaN and infinities.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from gemma_convert.errors import SourceError, short


def read_regular(path: Path, name: str, most: int) -> bytes:
    """The bytes of a file of at most `most` bytes, which messages call `name`.

    Raises SourceError where it is none (a pipe is not waited for), is larger or cannot be read,
    and FileNotFoundError where it is not there.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SourceError(f"{name} is not a file.", where=path)
            if status.st_size > most:
                raise SourceError(
                    f"{name} is too large.",
                    where=path,
                    expected=f"at most {most} bytes",
                    found=f"{status.st_size} bytes",
                )
            return file.read(most)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceError(f"{name} cannot be read.", where=path, found=error.strerror) from None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def read_object(path: Path, name: str, most: int) -> dict[str, Any]:
    """The JSON object in a file, as `read_regular` reads it.

    Raises SourceError where it is not JSON or no object, FileNotFoundError where it is not there.
    """
    return parse_object(read_regular(path, name, most), name, path)


def parse_object(data: bytes, name: str, path: Path) -> dict[str, Any]:
    """The JSON object in `data`, which `path` holds; SourceError where it is none."""
    try:
        values = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name} is not valid JSON.", where=path, found=error) from None
    if not isinstance(values, dict):
        raise SourceError(f"{name} is not a JSON object.", where=path, found=type(values).__name__)
    return values


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8; raises ValueError or RecursionError where it is not."""
    return json.loads(
        data.decode("utf-8"),
        object_pairs_hook=_once,
        parse_constant=_refuse,
        parse_float=_finite,
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{short(text)} is larger than any number")
    return value
