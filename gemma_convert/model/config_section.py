"""One JSON object of a config.json with typed access; what is wrong is named by file and key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, short

MAX_LAYERS = 1024
MAX_SIZE = 1 << 31


class Section:
    """One JSON object of config.json with typed access; errors name the file and the key.

    A default stands for a key that is left out, and not for null, which transformers refuses too.
    """

    def __init__(self, values: Mapping[str, Any], where: Path, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix

    def section(self, key: str) -> Section | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return Section(value, self.where, f"{self.prefix}{key}.")

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < MAX_SIZE:
            raise self.error(key, f"a whole number from {least} to {MAX_SIZE - 1}", value)
        return value

    def layers(self) -> int:
        count = self.integer("num_hidden_layers")
        if count > MAX_LAYERS:
            raise self.error("num_hidden_layers", f"at most {MAX_LAYERS}", count)
        return count

    def optional_integer(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key, least=0)

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(key, "a positive number", value)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def optional_text(self, *keys: str) -> str | None:
        return next((self.text(key) for key in keys if self.values.get(key) is not None), None)

    def error(self, key: str, expected: str, found: object) -> SourceError:
        nothing = "null" if key in self.values else "nothing"
        return SourceError(
            "config.json does not describe a model.",
            where=f"{self.where}, key {self.prefix}{key}",
            expected=expected,
            found=nothing if found is None else short(found),
        )
