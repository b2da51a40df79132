"""The model as a framework runs it: config.json with the facts that the framework is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, short
from gemma_convert.mapping.facts import FactRow, FactTable
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import parse_architecture
from gemma_convert.model.config_edit import with_facts
from gemma_convert.model.facts import (
    ARITHMETIC,
    FRACTIONS,
    LAYER_TYPES,
    SOFTCAP,
    Fact,
    facts_of,
    is_value,
    pattern_of,
)


@dataclass(frozen=True)
class Settings:
    """What a framework is told of a model: its key → value, and where that stands.

    `model` is the framework's model that says the rest, where there is one.
    """

    own: Mapping[str, Any]
    where: str
    model: str | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> Mapping[str, Any]:
        """All of it, the model's part included."""
        return {**self.rest, **self.own}

    @property
    def written(self) -> bool:
        """Whether anybody has told it anything; else the facts are the model's alone."""
        return bool(self.own)


@dataclass(frozen=True)
class NativeFacts:
    """A model as a framework runs it.

    `config` is config.json with the facts that it is told, of which `changed` are other ones: key →
    how. `differences` has what it builds in otherwise as well. `several` are facts of which the
    settings say more than one value, layer by layer, which config.json cannot.
    """

    architecture: Architecture
    config: Mapping[str, Any]
    changed: Mapping[str, str]
    differences: Mapping[str, str]
    several: Mapping[str, str]
    settings: Settings

    def check_single(self) -> None:
        """Raises SourceError where the settings say two values of one fact."""
        for key, how in self.several.items():
            raise SourceError(
                "The settings have two different values for one key of config.json.",
                where=f"{self.settings.where}, for {key}",
                expected="one value",
                found=how,
                do="give the same value everywhere",
            )


def native_facts(
    table: FactTable, settings: Settings, config: Mapping[str, Any], where: Path
) -> NativeFacts:
    """The model of a parsed config.json, at `where`, as the framework runs it.

    What layers compute with is taken from the settings; sizes, which tensors bear out, must be the
    same. Raises SourceError where they are not, and for what is no value of a fact.
    """
    model = parse_architecture(config, where)
    ours = facts_of(model)
    told: dict[str, dict[str, Fact]] = {}
    for row, key, value in _told(table, settings, ours):
        told.setdefault(row.hf, {})[key] = value
    wrong = {hf: said for hf, said in told.items() if set(said.values()) != {ours[hf]}}
    for hf, said in wrong.items():
        written = set(said) - (set(settings.rest) - set(settings.own))
        if hf not in ARITHMETIC and written and hf.startswith("text_config."):
            raise _another_shape(settings, said, ours[hf])
    wrong = {hf: said for hf, said in wrong.items() if hf in ARITHMETIC}
    facts = {hf: next(iter(said.values())) for hf, said in wrong.items() if _is_one(said)}
    built_in = dict(_built_in(table, model))
    changed = {
        hf: f"{_all(said)} in the settings, {ours[hf]} in config.json" for hf, said in wrong.items()
    }
    edited = with_facts(config, facts) if facts else config
    return NativeFacts(
        architecture=parse_architecture(with_facts(edited, built_in), where),
        config=edited,
        changed=changed,
        differences=changed
        | {
            hf: f"{value} in the framework, which cannot be told, {ours[hf]} in config.json"
            for hf, value in built_in.items()
            if value != ours[hf]
        },
        several={hf: _all(said) for hf, said in wrong.items() if not _is_one(said)},
        settings=settings,
    )


def _built_in(table: FactTable, model: Architecture) -> Iterator[tuple[str, Fact]]:
    """Key of config.json → value, of what layers compute with and the framework cannot be told."""
    ours = facts_of(model)
    for row in table.rows:
        known = row.fixed is not None or row.hf == SOFTCAP
        computed = row.hf in ours and row.hf in ARITHMETIC
        if row.why and known and computed and row.when.holds(model, {}):
            yield row.hf, row.fixed


def _is_one(said: Mapping[str, Fact]) -> bool:
    return len(set(said.values())) == 1


def _all(said: Mapping[str, Fact]) -> str:
    """The values, with a key for each where they are several."""
    if _is_one(said):
        return str(next(iter(said.values())))
    keys = {value: key for key, value in said.items()}
    return " and ".join(f"{value} ({key})" for value, key in keys.items())


def _another_shape(settings: Settings, said: Mapping[str, Fact], ours: Fact) -> SourceError:
    key, value = next((key, value) for key, value in said.items() if value != ours)
    return SourceError(
        "The settings belong to a model of another shape.",
        where=f"{settings.where}, key {key}",
        expected=f"{ours}, as config.json has it",
        found=short(value),
        do="give the config.json of the same model, or the settings that it was trained with: "
        "--settings",
    )


def _told(
    table: FactTable, settings: Settings, ours: Mapping[str, Fact]
) -> Iterator[tuple[FactRow, str, Fact]]:
    """Each fact of the model that the framework is told: its row, the framework's key, a value."""
    model = table.named.get(settings.model or "")
    for row in table.rows:
        if row.hf in ours and (model is None or row.native in model):
            for key, found in row.said_in(settings.said).items():
                yield row, key, value_of(row, key, found, settings.where)


def value_of(row: FactRow, key: str, found: Any, where: str) -> Fact:
    """A framework's spelling of a value as ours; no soft-cap is 0 there, and a pattern a list."""
    value = found
    if row.hf == LAYER_TYPES and isinstance(found, list):
        value = pattern_of([kind == "sliding_attention" for kind in found])
    elif row.hf in ARITHMETIC:
        value = _number(found)
        if row.hf == SOFTCAP and value == 0 and not isinstance(value, bool):
            value = None
    if not is_value(row.hf, value):
        raise SourceError(
            "A value in the settings has the wrong type.",
            where=f"{where}, key {key}",
            expected=_expected(row.hf),
            found=short(found),
        )
    return value  # type: ignore[no-any-return]


def _expected(key: str) -> str:
    if key in FRACTIONS:
        return "a number above 0, 1 at the most"
    return "a positive number" if key in ARITHMETIC else "a number, true or false"


def _number(found: Any) -> Any:
    """YAML takes 1e-5 for text, which other readers take for a number."""
    if isinstance(found, str):
        try:
            return float(found)
        except ValueError:
            pass
    return found
