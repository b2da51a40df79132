"""`[[fact]]` rows of a table: what a framework calls each fact of a model, and what it builds in.

A row has the key of config.json (`hf`) and the framework's key (`native`), or the value that the
framework builds in (`fixed`) and why, or says that the shapes of tensors tell it (`tensors`): a
model of other sizes does not load. `[models]` names the framework's model of each family,
`[named.MODEL]` what that model says already; a framework without such models is told everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from gemma_convert.errors import MappingError, SourceError, short
from gemma_convert.mapping.config_keys import config_keys
from gemma_convert.mapping.notation import Condition
from gemma_convert.mapping.record import Record
from gemma_convert.mapping.table import read_toml, table_file
from gemma_convert.mapping.versions import versioned
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.facts import Fact, facts_of, key_read

_OF_IMAGES = ("text_config.use_bidirectional_attention", "text_config.pad_token_id")
"""Facts of the text model that matter where there are images."""


@dataclass(frozen=True)
class FactRow:
    """One fact: its key in config.json, and how the framework is told it, or what it builds in.

    A row is there for the models for which `when` holds.
    """

    hf: str
    when: Condition
    native: str | None
    """The key, or a pattern of keys (`*` stands for any part) that all say this fact."""
    absent: Fact
    """What settings say that have no such key, where they hold the whole model; or None."""
    whole: bool
    """Whether the framework takes whole numbers alone."""
    fixed: Fact
    why: str
    tensors: bool

    def said_in(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The framework's key → value, of all keys that say this fact."""
        if self.native is None:
            return {}
        if "*" not in self.native:
            found = {self.native: settings[self.native]} if self.native in settings else {}
        else:
            found = {key: settings[key] for key in settings if fnmatchcase(key, self.native)}
        return found or ({} if self.absent is None else {self.native: self.absent})


@dataclass(frozen=True)
class FactTable:
    """The facts of a layout; `named` has what each model of the framework says: key → value."""

    rows: tuple[FactRow, ...]
    models: Mapping[str, str]
    named: Mapping[str, Mapping[str, Any]]

    def model(self, architecture: Architecture) -> str:
        """The framework's name for the model."""
        return self.models[architecture.family]

    def said(self, architecture: Architecture | None) -> Mapping[str, Any]:
        """Framework's key → value, of all that its own model says; nothing where it has none."""
        if architecture is None or not self.named:
            return {}
        return self.named[self.model(architecture)]

    def told(
        self, architecture: Architecture, *, vision: bool, ignore: Sequence[str] = ()
    ) -> dict[str, Fact]:
        """Framework's key → value, of all facts that differ from what the named model says.

        Facts of the vision tower count where it goes along (`vision`). Raises SourceError where a
        fact has another value than the framework builds in, or where its named model has nothing
        of the kind, unless it is one of `ignore`.
        """
        facts = facts_of(architecture)
        said = self.said(architecture)
        told: dict[str, Fact] = {}
        for row in self.rows:
            if row.tensors or row.hf not in facts or (not vision and is_of_vision(row.hf)):
                continue
            if not row.when.holds(architecture, {}):
                continue
            value, key = facts[row.hf], key_read(row.hf, architecture)
            if row.native is not None and row.native in said:
                if row.whole and value != int(value or 0):
                    raise _not_told(key, value, "a whole number", "it takes whole numbers alone")
                if said[row.native] != value:
                    told[row.native] = value
            elif not {row.hf, key}.isdisjoint(ignore):
                continue
            elif row.native is not None and self.named and value:
                raise _not_told(key, value, None, "its own model has nothing of the kind")
            elif row.native is None and value != said.get(row.hf, row.fixed):
                raise _not_told(key, value, said.get(row.hf, row.fixed), row.why)
        return told

    def model_facts(self, model: str, where: str) -> dict[str, Any]:
        """Framework's key → value, of all that its model of this name says.

        Raises SourceError where it has none; `where` names it.
        """
        if model not in self.named:
            raise SourceError(
                "The settings name an unknown model.",
                where=where,
                expected=", ".join(self.named),
                found=short(model),
            )
        return {key: value for key, value in self.named[model].items() if "." not in key}


def is_of_vision(hf: str) -> bool:
    """Whether a fact matters only where there are images."""
    return hf.startswith("vision_config.") or hf in _OF_IMAGES


def _not_told(key: str, value: Fact, built_in: Fact, why: str) -> SourceError:
    return SourceError(
        f"The framework cannot run a value of config.json: {why}.",
        where=f"config.json, key {key}",
        expected="null" if built_in is None else built_in,
        found=value,
        do=(
            "choose another layout with --format",
            f"if your framework can run it, ignore the key: --ignore-fact {key}",
        ),
    )


@cache
def load_facts(layout: str, version: str | None = None) -> FactTable | None:
    """The facts in the table of a layout, for a version of its framework; None where it has none.

    Raises MappingError where a row is wrong, or a fact of config.json has no row, and UsageError
    where there is no such version.
    """
    top, chosen = versioned(*read_toml(table_file(layout)), version)
    if not top.has("fact"):
        return None
    rows = tuple(
        row for record in top.records("fact") for row in _rows(record) if row.when.possible
    )
    lacking = sorted(set(config_keys().facts) - {row.hf for row in rows})
    if lacking:
        raise MappingError("A fact of config.json has no row.", where=top.where, found=lacking[0])
    models = {**top.table("models").values, **chosen.models}
    return FactTable(rows, models, top.table("named").values)


def _rows(record: Record) -> Iterator[FactRow]:
    record.only("hf", "when", "native", "absent", "whole", "fixed", "why", "tensors")
    if sum(map(record.has, ("native", "why", "tensors"))) != 1:
        raise record.error("A fact has `native`, `tensors` or `why`, one alone.")
    native = record.text("native") if record.has("native") else None
    values = record.values
    for hf in record.texts("hf"):
        if hf not in config_keys().facts:
            raise record.error("The row names no fact of huggingface.toml.", found=hf)
        yield FactRow(
            hf=hf,
            when=record.condition("when"),
            native=native,
            absent=values.get("absent"),
            whole=record.has("whole"),
            fixed=values.get("fixed"),
            why=record.text("why", ""),
            tensors=record.has("tensors"),
        )
