"""Typed access to one TOML table of a mapping file; every error names its place in the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gemma_convert.errors import MappingError
from gemma_convert.mapping.notation import (
    NO_VERSION,
    Condition,
    Pattern,
    Spellings,
    axis_of,
    parse_condition,
)
from gemma_convert.model.architecture import ENUMERATED, LAYER_FACTS

T = TypeVar("T")

_SINGULAR = {"rows": "row", "stacks": "stack"}


class Record:
    """One TOML table; `where` is the file, the section and the row.

    `version` has the facts of the framework's version that a condition may ask for.
    """

    def __init__(
        self, values: object, where: str, version: Mapping[str, bool] = NO_VERSION
    ) -> None:
        self.where, self.version = where, version
        if not isinstance(values, Mapping):
            raise self.error("A table is expected.", found=type(values).__name__)
        self.values: Mapping[str, Any] = values

    def error(self, what: str, *, expected: object = None, found: object = None) -> MappingError:
        return MappingError(what, where=self.where, expected=expected, found=found)

    def only(self, *keys: str) -> Record:
        unknown = sorted(set(self.values) - set(keys))
        if unknown:
            raise self.error(f"Unknown key `{unknown[0]}`.", expected=", ".join(keys))
        return self

    def has(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.error(f"`{key}` is a string.", found=value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """The strings under `key`, of which there may be one alone, without a list."""
        value = self.values.get(key)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
            raise self.error(f"`{key}` is a string or a list of strings.", found=value)
        return tuple(values)

    def condition(self, key: str, name: Pattern | None = None) -> Condition:
        """The condition under `key`; facts of a layer need `{layer}` in `name`."""
        if not self.has(key):
            return Condition()
        condition = self.checked(lambda text: parse_condition(text, self.version), self.text(key))
        if name is not None and "layers" not in name.axes and set(condition.facts) & LAYER_FACTS:
            raise self.error(f"`{key}` asks about a layer, but the name has no {{layer}}.")
        return condition

    def checked(self, parse: Callable[..., T], *args: str) -> T:
        """What `parse` returns; its errors get this record's place added."""
        try:
            return parse(*args)
        except MappingError as error:
            raise MappingError(
                error.what, where=f"{self.where}: {error.where}", found=error.found
            ) from None

    def records(self, key: str) -> list[Record]:
        values = self.values.get(key, [])
        if not isinstance(values, list):
            raise self.error(f"`{key}` is a list.", found=type(values).__name__)
        return [
            Record(value, f"{self.where}, {_SINGULAR.get(key, key)} {place}", self.version)
            for place, value in enumerate(values, 1)
        ]

    def table(self, key: str) -> Record:
        """The TOML table under `key`, empty where there is none."""
        return Record(self.values.get(key, {}), f"{self.where}, {key}", self.version)

    def patterns(self, key: str) -> tuple[str, ...]:
        """The regular expressions under `key`, none where there is no such key."""
        values = self.values.get(key, [])
        if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
            raise self.error(f"`{key}` is a list of patterns.", found=values)
        for one in values:
            try:
                re.compile(one)
            except (re.error, OverflowError, RecursionError) as error:
                raise self.error(f"`{key}` has no regular expression: {error}", found=one) from None
        return tuple(values)

    def spellings(self) -> Spellings:
        """axis → the names of its values, for axes whose values have names."""
        spellings = {}
        for word, names in self.table("spellings").values.items():
            axis = self.checked(axis_of, word, f"spellings.{word}")
            count = ENUMERATED.get(axis, 0)
            if not isinstance(names, list) or not len(set(map(str, names))) == len(names) == count:
                raise self.error(
                    f"The spellings of `{word}` are a list of distinct names.",
                    expected=f"{count} names" if count else f"none: {word} is counted",
                    found=names,
                )
            spellings[axis] = tuple(map(str, names))
        return spellings
