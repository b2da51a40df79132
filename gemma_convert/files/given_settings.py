"""What `--settings` gives: files of a framework's settings, and single ones as KEY=VALUE."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, UsageError, short
from gemma_convert.files.yaml_file import read_yaml

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class GivenSettings:
    """Files in their order, and key → value of single settings, which count last.

    Those that were `typed` are not from a file, and are there to have an effect.
    """

    files: tuple[Path, ...] = ()
    pairs: dict[str, Any] = field(default_factory=dict)
    typed: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.files or self.pairs)


def given_settings(items: Sequence[str]) -> GivenSettings:
    """What each of `items` names, which is a file or KEY=VALUE. Raises UsageError where neither.

    A file of KEY=VALUE, as `to-native` prints them, has single settings.
    """
    files, pairs, typed = [], dict[str, Any](), set[str]()
    for item in items:
        if os.path.isfile(item):  # noqa: PTH113 - a path that is too long is no file
            single = _single_settings(Path(item))
            pairs.update(single)
            files += [] if single else [Path(item)]
        elif "=" in item:
            pairs.update(_pair(item))
            typed.update(_pair(item))
        else:
            raise UsageError(
                "The value of --settings is neither an existing file nor KEY=VALUE.",
                where=f"--settings {short(item)}",
                expected="a file, or KEY=VALUE",
            )
    return GivenSettings(tuple(files), pairs, frozenset(typed))


def read_settings_file(path: Path, name: str) -> dict[str, Any]:
    """Key → value in a file of YAML or JSON. Raises SourceError where it is neither."""
    values = read_yaml(path, name, MAX_BYTES)
    if not isinstance(values, dict):
        raise SourceError(
            "The settings file does not contain a mapping of keys to values.",
            where=path,
            found=short(values),
        )
    return {str(key): value for key, value in values.items()}


def _single_settings(path: Path) -> dict[str, Any]:
    """The settings in a file of KEY=VALUE with spaces or lines between them; none in another."""
    values = read_yaml(path, path.name, MAX_BYTES)
    words = values.split() if isinstance(values, str) else []
    if not all("=" in word for word in words):
        return {}
    return {key: value for word in words for key, value in _pair(word).items()}


def _pair(text: str) -> dict[str, Any]:
    key, _, value = text.partition("=")
    return {key.strip(): _value(value.strip())}


def _value(text: str) -> Any:
    """The value of a setting as MaxText's command line has it: true, a number, or text."""
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
