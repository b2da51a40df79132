"""What an interrupted run had finished: one JSON line for each unit whose writes are committed.

The first line is a key of the plan and the source. A journal with another key is not continued, and
what a line says is believed only when its checksums are read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError
from gemma_convert.files.json_file import parse_json, read_regular
from gemma_convert.files.unfinished import JOURNAL as NAME

MAX_BYTES = 256 << 20


def journal_key(facts: Mapping[str, object]) -> str:
    """A digest of what must be the same for a run to be continued."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """The journal of one staged folder. `entries` are those of an earlier run with the same key.

    Of several processes each has its own.
    """

    def __init__(self, folder: Path, key: str, process: int = 0) -> None:
        self._path = folder / _name(process)
        self._lock = threading.Lock()
        self.entries = _read(self._path, key)
        if not self.entries:
            self._path.unlink(missing_ok=True)
            self._path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")

    def add(self, entry: Mapping[str, object]) -> None:
        """Notes that a unit is finished; the line is complete or not there."""
        with self._lock:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def close(self) -> None:
        """No more units come; the journal stays until `remove_journals`."""
        self._file.close()


def remove_journals(folder: Path, processes: int = 1) -> None:
    """The run is complete, and everything it wrote is durable."""
    for process in range(processes):
        (folder / _name(process)).unlink(missing_ok=True)


def matches(folder: Path, key: str) -> bool:
    """Whether `folder` holds the journal of a run with this key."""
    return bool(_lines(folder / NAME)[:1] == [{"key": key}])


def _name(process: int) -> str:
    return f"{NAME}.{process}" if process else NAME


def _read(path: Path, key: str) -> list[dict[str, Any]]:
    first, *entries = _lines(path) or [{}]
    return entries if first == {"key": key} else []


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole JSON objects; a line cut short by the end of a run is none.

    What follows the last whole line is dropped, so that new lines are not glued to it.
    """
    try:
        data = b"" if path.is_symlink() else read_regular(path, "The journal", MAX_BYTES)
    except (OSError, SourceError):
        return []
    lines: list[dict[str, Any]] = []
    whole = 0
    for line in data.split(b"\n")[:-1]:
        try:
            entry = parse_json(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        lines.append(entry)
        whole += len(line) + 1
    if lines and whole < len(data):
        os.truncate(path, whole)
    return lines
