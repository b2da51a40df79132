"""The facts of a table as entries to be read, searched and compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gemma_convert.mapping.config_keys import config_keys
from gemma_convert.mapping.facts import FactRow, FactTable
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.facts import Fact, facts_of


@dataclass(frozen=True)
class FactEntry:
    """One key of config.json, and what a framework calls it, `native`, where it is told it.

    `fixed` is the value that the framework builds in, `value` that of the model, and `named` what
    the framework's own model says of it; a fact is told where these two differ. `why` says why a
    fact is built in, or why a key is none.
    """

    kind: Literal["told", "built in", "shapes", "ignored"]
    hf: str
    native: str | None = None
    fixed: Fact = None
    value: Fact = None
    named: Fact = None
    why: str | None = None


def list_facts(table: FactTable, architecture: Architecture | None) -> tuple[FactEntry, ...]:
    """An entry for every fact, with the values of a model where there is one, and for every key.

    Keys that are no facts stand last, as the patterns that they are.
    """
    return (*_entries(table, architecture), *_ignored())


def _entries(table: FactTable, architecture: Architecture | None) -> Iterator[FactEntry]:
    values = {} if architecture is None else facts_of(architecture)
    said = table.said(architecture)
    for row in table.rows:
        if architecture is None or row.hf in values:
            yield FactEntry(
                kind=_kind(row),
                hf=row.hf,
                native=row.native,
                fixed=said.get(row.hf, row.fixed),
                value=values.get(row.hf),
                named=None if row.native is None else said.get(row.native),
                why=row.why or None,
            )


def _kind(row: FactRow) -> Literal["told", "built in", "shapes"]:
    if row.native is not None:
        return "told"
    return "shapes" if row.tensors else "built in"


def _ignored() -> Iterator[FactEntry]:
    for pattern, why in config_keys().ignored.items():
        yield FactEntry("ignored", pattern, why=why)
