"""Every key of config.json: a fact of a model, or listed as none, with the reason why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, some
from gemma_convert.mapping.record import Record
from gemma_convert.mapping.table import HUGGINGFACE, read_toml, table_file


@dataclass(frozen=True)
class ConfigKeys:
    """The facts of a model; and pattern of a key → why it is none, or which fact it spells."""

    facts: tuple[str, ...]
    ignored: Mapping[str, str]


@cache
def config_keys() -> ConfigKeys:
    """The `[[fact]]` rows of huggingface.toml. Raises MappingError where one is wrong."""
    facts: list[str] = []
    ignored: dict[str, str] = {}
    for record in Record(*read_toml(table_file(HUGGINGFACE))).records("fact"):
        record.only("hf", "ignored")
        keys = record.texts("hf")
        if record.has("ignored"):
            ignored.update(dict.fromkeys(keys, record.text("ignored")))
        else:
            facts.extend(keys)
    return ConfigKeys(tuple(facts), ignored)


def check_keys(
    config: Mapping[str, Any], text_only: bool, ignore: Sequence[str], where: Path
) -> None:
    """Nothing where every key of a config.json is known, or is one of `ignore`.

    Raises SourceError that names the others.
    """
    known = config_keys()
    unknown = [
        key
        for key in _keys(config, "text_config." if text_only else "")
        if key not in known.facts
        and key not in ignore
        and not any(fnmatchcase(key, pattern) for pattern in known.ignored)
    ]
    if unknown:
        raise SourceError(
            "config.json has a key that gemma-convert does not know.",
            where=where,
            found=some(unknown),
            do="if it changes nothing that the model computes, ignore it: --ignore-fact KEY",
        )


def _keys(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("id2label", "label2id", "per_layer_config"):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
