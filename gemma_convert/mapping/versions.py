"""Versions of a framework that a table is for: what only some of them have, and their models.

```toml
[versions."1.0"]             # the first is meant where none is named

[versions."2.0"]
has = ["embedder"]           # a fact that conditions of the table may ask for
models = { 12b = "name" }    # over those of [models]
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gemma_convert.errors import UsageError, short
from gemma_convert.mapping.record import Record
from gemma_convert.model.architecture import FACTS


@dataclass(frozen=True)
class Version:
    """One version of a framework; `name` is None where the table knows no versions.

    `facts` says of every fact that some version has whether this one has it.
    """

    name: str | None = None
    facts: Mapping[str, bool] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)


def versioned(values: object, file: str, name: str | None) -> tuple[Record, Version]:
    """The top of a table, whose conditions know the version `name`, and that version.

    Raises MappingError where the versions are not well formed, UsageError where there is none of
    that name.
    """
    entries = Record(values, file).table("versions")
    known = {key: entries.table(key).only("has", "models") for key in entries.values}
    has = {key: entry.texts("has") if entry.has("has") else () for key, entry in known.items()}
    words = {word for each in has.values() for word in each}
    if words & FACTS:
        raise entries.error("A fact of a version has the name of one of models.", found=words)
    if name is None:
        name = next(iter(known), None)
    elif name not in known:
        raise UsageError(
            "This version of the framework is not supported.",
            where=file,
            expected=", ".join(known) or "no version at all",
            found=short(name),
            do="choose another one with --framework-version, or leave it out",
        )
    if name is None:
        return Record(values, file), Version()
    facts = {word: word in has[name] for word in sorted(words)}
    return Record(values, file, facts), Version(name, facts, known[name].table("models").values)
