"""The notation of the mapping tables: one array over named axes, as one layout shows it.

A view is a name and a shape, `layers.{layer}.self_attn.q_proj.weight [(heads head_dim) embed]`.
Every axis stands in one of two places: as a placeholder in the name (one tensor for each value) or
in the brackets (one dimension, or part of one where axes are grouped in parentheses). `1` is a
dimension of length one, which is no axis. A placeholder may use the singular of an axis word, so
`{layer}` and the `layers` of `(layers ple)` are one axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from gemma_convert.errors import MappingError
from gemma_convert.model.architecture import AXES, FACTS, Architecture

UNIT = "1"

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_TOKEN = re.compile(r"[a-z_]+|1|[()]")
_CONDITION = re.compile(r"!?[a-z_]+")

NO_VERSION: Mapping[str, bool] = MappingProxyType({})

Index = Mapping[str, int]
Spellings = Mapping[str, tuple[str, ...]]


def axis_of(word: str, text: str) -> str:
    """The axis that a placeholder word means; raises MappingError for a word that is no axis."""
    for axis in (word, word + "s"):
        if axis in AXES:
            return axis
    raise MappingError(
        f"`{word}` is not an axis.", where=text, do="use an axis word that the architecture sizes"
    )


@dataclass(frozen=True)
class Pattern:
    """A name with placeholders, such as `layers.{layer}.mlp.{gate_up}_proj.weight`."""

    text: str

    @cached_property
    def _parts(self) -> tuple[str, ...]:
        """Literal text and axis words in turn: even places are literal, odd ones are axes."""
        parts = _PLACEHOLDER.split(self.text)
        if any("{" in literal or "}" in literal for literal in parts[::2]):
            raise MappingError("A placeholder is not closed or not a word.", where=self.text)
        parts[1::2] = [axis_of(word, self.text) for word in parts[1::2]]
        return tuple(parts)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Axes that stand in the name, in order."""
        return self._parts[1::2]

    def render(self, index: Index, spellings: Spellings) -> str:
        """The name of one tensor, with the axes of `index` spelled as the layout spells them."""
        parts = list(self._parts)
        for place in range(1, len(parts), 2):
            axis = parts[place]
            words = spellings.get(axis)
            parts[place] = words[index[axis]] if words else str(index[axis])
        return "".join(parts)


@dataclass(frozen=True)
class View:
    """One array as a layout shows it. Each dimension is a group of axes, slowest first."""

    pattern: Pattern
    dims: tuple[tuple[str, ...], ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes: those in the name, then those in the shape. Units are not axes."""
        return self.pattern.axes + tuple(axis for dim in self.dims for axis in dim)

    @property
    def shape_text(self) -> str:
        """What stands in the brackets."""
        return " ".join(
            UNIT if not dim else dim[0] if len(dim) == 1 else f"({' '.join(dim)})"
            for dim in self.dims
        )

    def __str__(self) -> str:
        return f"{self.pattern.text} [{self.shape_text}]"


def parse_view(text: str) -> View:
    """The view that `name [axes]` describes.

    Raises MappingError, naming the text and the part that is wrong, for an unknown axis, an axis
    used twice, unbalanced parentheses or a missing shape.
    """
    name, bracket, shape = text.partition(" [")
    if not bracket or not shape.endswith("]") or not name or " " in name:
        raise MappingError("A view is a name and its axes in brackets.", where=text)
    view = View(Pattern(name), _parse_dims(shape[:-1], text))
    if " ".join(shape[:-1].split()) != view.shape_text:
        raise MappingError("Axes are separated by spaces.", where=text, expected=str(view))
    twice = sorted({axis for axis in view.axes if view.axes.count(axis) > 1})
    if twice:
        raise MappingError(f"The axis `{twice[0]}` is used twice.", where=text)
    return view


def _parse_dims(shape: str, text: str) -> tuple[tuple[str, ...], ...]:
    if re.sub(_TOKEN, "", shape).strip():
        raise MappingError("The axes hold a character that is not allowed.", where=text)
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in _TOKEN.findall(shape):
        if token == "(" and group is None:
            group = []
        elif token == ")" and group:
            dims.append(tuple(group))
            group = None
        elif token in "()":
            raise MappingError("The parentheses do not match, or are empty or nested.", where=text)
        elif token == UNIT:
            if group is not None:
                raise MappingError("`1` cannot stand in a group.", where=text)
            dims.append(())
        elif token not in AXES:
            raise MappingError(f"`{token}` is not an axis.", where=text)
        elif group is None:
            dims.append((token,))
        else:
            group.append(token)
    if group is not None:
        raise MappingError("A parenthesis is not closed.", where=text)
    return tuple(dims)


@dataclass(frozen=True)
class Condition:
    """A conjunction of facts, such as `owns_kv & !moe`; empty means always.

    One that is not `possible` holds nowhere: it asks for what a version of a framework has not.
    """

    terms: tuple[tuple[str, bool], ...] = ()
    possible: bool = True

    @property
    def facts(self) -> tuple[str, ...]:
        return tuple(fact for fact, _ in self.terms)

    def holds(self, architecture: Architecture, index: Index) -> bool:
        """Whether all facts are as the condition wants them at that place."""
        return self.possible and all(
            architecture.holds(fact, index) is wanted for fact, wanted in self.terms
        )

    def __and__(self, other: Condition) -> Condition:
        return Condition(self.terms + other.terms, self.possible and other.possible)

    def __invert__(self) -> Condition:
        """Where the condition does not hold; it is one fact."""
        ((fact, wanted),) = self.terms
        return Condition(((fact, not wanted),))


def parse_condition(text: str, version: Mapping[str, bool] = NO_VERSION) -> Condition:
    """The condition that `a & !b` describes; raises MappingError for a word that is no fact.

    `version` has the facts of the framework's version, which hold or do not whatever the model is.
    """
    terms, possible = [], True
    for term in text.split("&"):
        word = term.strip()
        if not _CONDITION.fullmatch(word):
            raise MappingError("A condition is facts joined by `&`, with `!` for not.", where=text)
        fact, wanted = word.lstrip("!"), not word.startswith("!")
        if fact in version:
            possible = possible and version[fact] is wanted
            continue
        if fact not in FACTS:
            raise MappingError(f"`{fact}` is not a fact.", where=text)
        terms.append((fact, wanted))
    return Condition(tuple(terms), possible)


def split_path(text: str) -> tuple[str, ...]:
    """The keys of a native path: split at slashes, but not inside single quotes.

    `audio_encoder/'conformer/stacked_layers_0'/final_ln` has three keys.
    """
    quoted = text.split("'")
    if len(quoted) % 2 == 0:
        raise MappingError("A quote in a path is not closed.", where=text)
    keys: list[str] = [""]
    for place, piece in enumerate(quoted):
        if place % 2:
            keys[-1] += piece
        else:
            head, *rest = piece.split("/")
            keys[-1] += head
            keys.extend(rest)
    if not all(keys):
        raise MappingError("A path has an empty key.", where=text)
    return tuple(keys)


def join_path(keys: Sequence[str]) -> str:
    """The text of a native path: keys that hold a slash are quoted.

    Raises MappingError for a key that no path can hold.
    """
    if not keys or any(not key or "'" in key for key in keys):
        raise MappingError("A key is empty or holds a quote.", where=" ".join(keys))
    return "/".join(f"'{key}'" if "/" in key else key for key in keys)
