"""A config.json as the formulas read it: sizes by key, and a clear message where one is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_convert.checkpoint.sidecar import FOLDER, sidecar_root
from gemma_convert.errors import SourceError, short
from gemma_convert.files.json_file import read_object
from gemma_convert.model.config import MAX_CONFIG_BYTES
from gemma_convert.model.config_section import MAX_LAYERS, MAX_SIZE


@dataclass(frozen=True)
class ConfigFile:
    """One JSON object of a config.json; `prefix` names it in messages."""

    values: Mapping[str, Any]
    where: Path
    prefix: str = ""

    def section(self, key: str) -> ConfigFile:
        """The object that stands at `key`."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return ConfigFile(value, self.where, f"{self.prefix}{key}.")

    def size(self, key: str, default: int | None, least: int = 1) -> int:
        """The whole number at `key`, `default` where there is none."""
        value = self.values.get(key)
        if value is None:
            value = default
        most = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE - 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(key, f"a whole number from {least} to {most}", value)
        return value

    def truth(self, key: str, default: bool) -> bool:
        """The boolean at `key`, `default` where there is none."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def items(self, key: str) -> list[Any] | None:
        """The list at `key`, None where there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            raise self.error(key, "a list", value)
        return value

    def layers(self, key: str) -> list[int] | None:
        """The numbers of layers that are listed at `key`, None where there is no list."""
        found = self.items(key)
        for one in found or ():
            if not isinstance(one, int) or isinstance(one, bool) or one < 0:
                raise self.error(key, "numbers of layers", one)
        return found

    def error(self, key: str, expected: str, found: object) -> SourceError:
        """The message about one key."""
        return SourceError(
            "config.json does not describe a model.",
            where=f"{self.where}, key {self.prefix}{key}",
            expected=expected,
            found="nothing" if found is None else short(found),
        )


def load_config(path: Path) -> ConfigFile:
    """The config.json of a file, of a Hugging Face folder, or of a converted checkpoint's sidecar.

    Raises SourceError where there is none, or where it is no JSON object.
    """
    file = _find(path)
    try:
        values = read_object(file, "config.json", MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise SourceError(
            "There is no config.json, so nothing says which model this is.",
            where=file,
            do="give a config.json or a Hugging Face folder, such as hf/ of a converted checkpoint",
        ) from None
    return ConfigFile(values, file)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not (path / "config.json").exists() and path.is_dir():
        root = sidecar_root(path)
        if root is not None:
            return root / FOLDER / "config.json"
    return path / "config.json" if path.is_dir() else path
