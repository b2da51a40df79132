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

    `differences` has what is not as config.json has it: its key → how. `several` are facts of
    which the settings say more than one value, layer by layer, which config.json cannot.
    """

    architecture: Architecture
    config: Mapping[str, Any]
    differences: Mapping[str, str]
    several: Mapping[str, str]
    settings: Settings

    def check_single(self) -> None:
        """Raises SourceError where the settings say two values of one fact."""
        for key, how in self.several.items():
            raise SourceError(
                "The settings say two values of one fact, and config.json has place for one.",
                where=f"{self.settings.where}, for {key}",
                expected="one value",
                found=how,
                do="say the same wherever the fact stands",
            )


def native_facts(
    table: FactTable, settings: Settings, config: Mapping[str, Any], where: Path
) -> NativeFacts:
    """The model of a parsed config.json, at `where`, as the framework runs it.

    What layers compute with is taken from the settings; sizes, which tensors bear out, must be the
    same. Raises SourceError where they are not, and for what is no value of a fact.
    """
    ours = facts_of(parse_architecture(config, where))
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
    edited = with_facts(config, facts)
    return NativeFacts(
        architecture=parse_architecture(edited, where),
        config=edited if facts else config,
        differences={
            hf: f"{_all(said)} in the settings, {ours[hf]} in config.json"
            for hf, said in wrong.items()
        },
        several={hf: _all(said) for hf, said in wrong.items() if not _is_one(said)},
        settings=settings,
    )


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
        "The settings are those of a model of another shape.",
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
            "The settings say what is no value of this fact.",
            where=f"{where}, key {key}",
            expected="a positive number" if row.hf in ARITHMETIC else "a number, true or false",
            found=short(found),
        )
    return value  # type: ignore[no-any-return]


def _number(found: Any) -> Any:
    """YAML takes 1e-5 for text, which other readers take for a number."""
    if isinstance(found, str):
        try:
            return float(found)
        except ValueError:
            pass
    return found
