"""Reads one YAML file of a checkpoint strictly, whatever it turns out to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gemma_convert.errors import SourceError
from gemma_convert.files.json_file import read_regular

MAX_SCALAR = 1000
"""Characters of a key or value; PyYAML takes quadratic time for some that are longer."""

_UNREADABLE = (
    yaml.YAMLError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    ValueError,
)
"""What PyYAML raises on broken input, such as `!!bool maybe`."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader without merging, with which a short text becomes one without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merging", node.start_mark)

    def construct_scalar(self, node: yaml.Node) -> Any:
        if isinstance(node.value, str) and len(node.value) > MAX_SCALAR:
            raise yaml.constructor.ConstructorError(None, None, "a long value", node.start_mark)
        return super().construct_scalar(node)


def read_yaml(path: Path, name: str, most: int) -> Any:
    """The value in a YAML file of at most `most` bytes, which messages call `name`.

    Raises SourceError where it cannot be read or is not YAML.
    """
    try:
        return yaml.load(read_regular(path, name, most).decode("utf-8"), _Loader)
    except FileNotFoundError as error:
        raise SourceError(f"{name} cannot be read.", where=path, found=error.strerror) from None
    except _UNREADABLE as error:
        found = " ".join(str(error).split())[:300]
        raise SourceError(f"{name} is not valid YAML.", where=path, found=found) from None
