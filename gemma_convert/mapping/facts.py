"""`[[fact]]` rows of a table: what a framework calls each fact of a model, and what it builds in.

A row has the key of config.json (`hf`) and the framework's key (`native`), or the value that the
framework builds in (`fixed`) and why, or says that the shapes of tensors tell it (`tensors`): a
model of other sizes does not load. `[models]` names the framework's model of each family,
`[named.MODEL]` what that model says already. huggingface.toml lists every key of config.json.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from gemma_convert.errors import MappingError, SourceError, short
from gemma_convert.mapping.notation import Condition
from gemma_convert.mapping.record import Record
from gemma_convert.mapping.table import HUGGINGFACE, table_file
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.facts import (
    ARITHMETIC,
    SOFTCAP,
    TIED,
    Fact,
    facts_of,
    is_value,
    with_facts,
)

SHOWN = 8

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
    fixed: Fact
    why: str
    tensors: bool
    where: str


@dataclass(frozen=True)
class FactTable:
    """The facts of a layout; `named` has what each model of the framework says: key → value."""

    rows: tuple[FactRow, ...]
    models: Mapping[str, str]
    named: Mapping[str, Mapping[str, Any]]

    def model(self, architecture: Architecture) -> str:
        """The framework's name for the model."""
        return self.models[architecture.family]

    def told(
        self, architecture: Architecture, *, vision: bool, ignore: Sequence[str] = ()
    ) -> dict[str, Fact]:
        """Framework's key → value, of all facts that differ from what the named model says.

        Facts of the vision tower count where it goes along (`vision`). Raises SourceError where a
        fact has another value than the framework builds in, unless it is one of `ignore`.
        """
        facts = facts_of(architecture)
        said = self.named[self.model(architecture)]
        told: dict[str, Fact] = {}
        for row in self.rows:
            if row.tensors or row.hf not in facts or (not vision and _of_vision(row.hf)):
                continue
            if not row.when.holds(architecture, {}):
                continue
            value = facts[row.hf]
            if row.native is None:
                if row.hf not in ignore:
                    _check_fixed(row, value, said)
            elif row.native in said and said[row.native] != value:
                told[row.native] = value
        return told

    def run_by(
        self, architecture: Architecture, model: str, settings: Mapping[str, Any], where: Path
    ) -> tuple[Architecture, dict[str, str]]:
        """The model as the framework runs it, which says what `model` says and these settings.

        And the facts in which that differs from config.json: key → how. A soft-cap of 0 is none;
        sizes are those of the tensors. Raises SourceError for a model that there is none of, and
        for what is no value of a fact; `where` has the settings.
        """
        if model not in self.named:
            raise SourceError(
                "The settings name a model that is not known.",
                where=where,
                expected=", ".join(self.named),
                found=short(model),
            )
        said = {**self.named[model], **settings}
        rows = [row for row in self.rows if row.native in said and row.hf in ARITHMETIC]
        native = with_facts(architecture, {row.hf: _value(row, said, where) for row in rows})
        ours, theirs = facts_of(native), facts_of(architecture)
        return native, {
            key: f"{ours[key]} in the settings, {theirs[key]} in config.json"
            for key in theirs
            if ours[key] != theirs[key]
        }


def _value(row: FactRow, said: Mapping[str, Any], where: Path) -> Fact:
    found = said[str(row.native)]
    value: Fact = None if row.hf == SOFTCAP and found == 0 else found
    if not is_value(row.hf, value):
        raise SourceError(
            "The settings say what is no value of this fact.",
            where=f"{where}, key {row.native}",
            expected="true or false" if row.hf == TIED else "a positive number",
            found=short(found),
        )
    return value


def _of_vision(hf: str) -> bool:
    return hf.startswith("vision_config.") or hf in _OF_IMAGES


def _check_fixed(row: FactRow, value: Fact, said: Mapping[str, Any]) -> None:
    fixed = said.get(row.hf, row.fixed)
    if value != fixed:
        raise SourceError(
            f"A fact of this model cannot be told to the framework: {row.why}.",
            where=f"config.json, key {row.hf}",
            expected="null" if fixed is None else fixed,
            found=value,
            do="choose another layout with --format; if the framework at hand is another, "
            f"--ignore-fact {row.hf}",
        )


@cache
def load_facts(layout: str) -> FactTable | None:
    """The facts in the table of a layout; None where it declares none.

    Raises MappingError where a row is wrong, or a fact of config.json has no row.
    """
    file = table_file(layout)
    top = Record(_read(file), file.name)
    if not top.has("fact"):
        return None
    rows = tuple(_row(record) for record in top.records("fact"))
    known = {row.hf for row in rows}
    lacking = sorted(set(_claims().facts) - known)
    if lacking:
        raise MappingError("A fact of config.json has no row.", where=file.name, found=lacking[0])
    return FactTable(rows, top.table("models").values, top.table("named").values)


def _row(record: Record) -> FactRow:
    record.only("hf", "when", "native", "fixed", "why", "tensors")
    hf = record.text("hf")
    if sum(map(record.has, ("native", "why", "tensors"))) != 1:
        raise record.error("A fact has `native`, `tensors` or `why`, one alone.", found=hf)
    if hf not in _claims().facts:
        raise record.error("The row names no fact of huggingface.toml.", found=hf)
    native = record.text("native") if record.has("native") else None
    why, tensors = record.text("why", ""), record.has("tensors")
    when, fixed = record.condition("when"), record.values.get("fixed")
    return FactRow(hf, when, native, fixed, why, tensors, record.where)


@dataclass(frozen=True)
class _Claims:
    """Every key of config.json: the facts of a model, and patterns of what is none, with why."""

    facts: tuple[str, ...]
    others: tuple[str, ...]


@cache
def _claims() -> _Claims:
    file = table_file(HUGGINGFACE)
    facts: list[str] = []
    others: list[str] = []
    for record in Record(_read(file), file.name).records("fact"):
        record.only("hf", "ignored")
        keys = record.values.get("hf")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise record.error("`hf` is a list of keys.", found=keys)
        (others if record.has("ignored") else facts).extend(keys)
    return _Claims(tuple(facts), tuple(others))


def check_keys(
    config: Mapping[str, Any], text_only: bool, ignore: Sequence[str], where: Path
) -> None:
    """Nothing where every key of a config.json is known, or is one of `ignore`.

    Raises SourceError that names the others.
    """
    claims = _claims()
    unknown = [
        key
        for key in _keys(config, "text_config." if text_only else "")
        if key not in claims.facts
        and key not in ignore
        and not any(fnmatchcase(key, pattern) for pattern in claims.others)
    ]
    if unknown:
        more = f", and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise SourceError(
            "config.json has a key that no table knows, so nothing says what becomes of it.",
            where=where,
            found=", ".join(unknown[:SHOWN]) + more,
            do="go on without it, if it changes nothing that is computed: --ignore-fact KEY",
        )


def _keys(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("id2label", "label2id", "per_layer_config"):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _read(file: Path) -> Mapping[str, Any]:
    return tomllib.loads(file.read_text(encoding="utf-8"))
