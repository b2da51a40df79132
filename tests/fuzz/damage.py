"""Ways in which JSON documents and files of a checkpoint may be broken, by chance or on purpose."""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Raw:
    """Text that stands in a document as it is."""

    text: str

    def __repr__(self) -> str:
        return f"Raw({self.text[:30]!r}… {len(self.text)})"


@dataclass(frozen=True)
class Twice:
    """An object in which every key stands twice."""

    values: dict[str, Any]


DEEP = Raw("[" * 100_000)
CLOSED = Raw("[" * 900 + "]" * 900)
OBJECTS = Raw('{"a":' * 900 + "1" + "}" * 900)

NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 7, 1024, 1025, 1 << 31, (1 << 31) - 1, 1 << 62, 1 << 63, 1 << 64, 10**30,
    -(1 << 63), 1_000_000_000, 0.5, -0.0, 2.0, 1e-320, 1e308, True, False, Raw("NaN"),
    Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("0x10"), Raw("007"),
)  # fmt: skip
TEXTS = (
    "", ".", "..", "../x.safetensors", "/etc/x.safetensors", "a/b", "a\\b", "a/../../b", "~", "'",
    "it's", "\0", "\n", "\x1b[2J", "\ud800", "\udcff", "ü", "\u202e", "x" * 300, "x" * 5000,
    "model.safetensors", "F32", "BF16", "F33", "full_attention", "gemma4", "float32", "NaN", "3",
    "[bold]", "1" * 5000, "layers." + "9" * 5000 + ".x",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *NUMBERS, *TEXTS, None, [], {}, [[]], [None], [-1], [1.5], [True], ["a"], [1 << 62] * 33,
    [0, 1 << 62], [1, 2, 3], {"a": 1}, DEEP, CLOSED, OBJECTS,
)  # fmt: skip


def dump(value: Any) -> str:
    """JSON text, broken where the value says so."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Twice):
        pairs = [*value.values.items(), *value.values.items()]
        return "{" + ",".join(f"{json.dumps(key)}:{dump(inner)}" for key, inner in pairs) + "}"
    if isinstance(value, dict):
        pairs = [f"{json.dumps(key)}:{dump(inner)}" for key, inner in value.items()]
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in inner:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))


def put(document: Any, path: Sequence[Any], value: Any) -> None:
    """Replaces one value; a path that an earlier change removed is left alone."""
    inner = document
    for key in path[:-1]:
        if not _has(inner, key):
            return
        inner = inner[key]
    if _has(inner, path[-1]):
        inner[path[-1]] = value


def _has(inner: Any, key: Any) -> bool:
    if isinstance(inner, dict):
        return key in inner
    return isinstance(inner, list) and isinstance(key, int) and key < len(inner)


def altered(
    document: Any, values: Sequence[Any] = VALUES, most: int = 2
) -> st.SearchStrategy[bytes]:
    """A document with one or a few values replaced, removed, renamed, moved or standing twice."""
    return _altered(document, sorted(places(document), key=str), values, most)


@st.composite
def _altered(
    draw: st.DrawFn, whole: Any, paths: Sequence[Any], values: Sequence[Any], most: int
) -> bytes:
    document = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(paths))
        how = draw(st.integers(0, 9))
        parent = document
        try:
            for key in path[:-1]:
                parent = parent[key]
            old = parent[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue
        if not isinstance(parent, dict | list):
            continue
        if how == 0:
            del parent[path[-1]]
        elif how == 1 and isinstance(parent, dict):
            parent[draw(st.sampled_from(TEXTS))] = parent.pop(path[-1])
        elif how == 2 and isinstance(old, dict):
            parent[path[-1]] = Twice(old)
        elif how == 3:
            other = draw(st.sampled_from(paths))
            inner = document
            try:
                for key in other:
                    inner = inner[key]
                parent[path[-1]] = copy.deepcopy(inner)
            except (KeyError, IndexError, TypeError):
                continue
        else:
            parent[path[-1]] = draw(st.sampled_from(values))
    return dump(document).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with some flipped, removed, put in, or cut off."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.integers(0, 4))
        if how == 0:
            del content[place:]
        elif how == 1:
            del content[place : place + draw(st.integers(1, 40))]
        elif how == 2:
            content[place:place] = draw(st.binary(min_size=1, max_size=12))
        elif content:
            content[place] = draw(st.integers(0, 255))
    return bytes(content)


STRANGE = ("folder", "pipe", "socket", "device", "dangling link", "link to itself", "empty")
"""What may stand where a file should be."""


def make_strange(path: Path, kind: str) -> None:
    """Puts something else in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            here = os.open(path.parent, os.O_RDONLY)
            try:
                bound.bind(f"/proc/self/fd/{here}/{path.name}")
            finally:
                os.close(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    else:
        path.write_bytes(b"")
