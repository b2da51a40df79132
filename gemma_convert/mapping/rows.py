"""The rows of a mapping table, typed: what one says of a tensor, of a model and of a layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from gemma_convert.mapping.notation import Condition, Pattern, Spellings, View


@dataclass(frozen=True)
class HFRow:
    """One family of Hugging Face tensors; where `optional` holds, a tensor may be absent.

    In a model whose output head is tied, it is absent or equals the one that `tied` names. The
    optional tensors of one layer are all there or none, or those of one weight that is named as
    being `together`.
    """

    view: View
    when: Condition
    optional: Condition | None
    tied: str | None
    text_only_name: Pattern
    where: str
    together: str = ""

    def name(self, text_only: bool) -> Pattern:
        return self.text_only_name if text_only else self.view.pattern


@dataclass(frozen=True)
class NativeRow:
    """The two views of one parameter.

    The native side is larger by the root of axis `scale`; the Hugging Face tensors along axis
    `share` are one on the native side; `fill` is there what an absent optional tensor leaves open.
    """

    hf: HFRow
    native: View
    when: Condition
    scale: str | None
    share: str | None
    fill: int | None
    tower: str | None
    where: str

    def __str__(self) -> str:
        return f"{self.hf.view} | {self.native}"


@dataclass(frozen=True)
class CarriedRow:
    """Hugging Face rows that a layout has no place for; a `name` ending in `*` is a prefix."""

    name: str
    when: Condition
    why: str
    where: str

    def matches(self, row: HFRow) -> bool:
        text = row.view.pattern.text
        return text.startswith(self.name[:-1]) if self.name.endswith("*") else text == self.name


@dataclass(frozen=True)
class Refusal:
    """Models that a layout cannot hold, why, and the Hugging Face rows that it has no place for."""

    when: Condition
    why: str
    names: tuple[str, ...]


Conditional = TypeVar("Conditional", NativeRow, CarriedRow, Refusal)


def possible(rows: Iterable[Conditional]) -> tuple[Conditional, ...]:
    """The rows that the version of the framework has, for which a table was read."""
    return tuple(row for row in rows if row.when.possible)


@dataclass(frozen=True)
class Stack:
    """Layers that a placement stacks into one array: paths below `start` move below `end`."""

    when: Condition
    start: str
    end: str
    index: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Where stacking axes go: after the first `after` dimensions of every array of a stack."""

    name: str
    axis: str
    after: int
    refused: tuple[tuple[Condition, str], ...]
    stacks: tuple[Stack, ...]


@dataclass(frozen=True)
class MatrixForm:
    """How a layout has one matrix of an adapter.

    `name` is its path, with `{array}` where that of the changed array stands; `shape` has a word
    for each dimension: `rank`, `in` or `out` for one dimension an axis, `(in)` or `(out)` for one
    dimension of all axes.
    """

    name: str
    shape: tuple[str, ...]

    def dims(
        self, *, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> tuple[tuple[str, ...], ...]:
        """The dimensions, for a weight with these axes."""
        axes = {"in": inputs, "out": outputs, "rank": ("rank",)}
        found: list[tuple[str, ...]] = []
        for word in self.shape:
            grouped = axes[word.strip("()")]
            found += [grouped] if word.startswith("(") else [(axis,) for axis in grouped]
        return tuple(found)


@dataclass(frozen=True)
class AdapterForm:
    """How a layout has an adapter: its two matrices, and the weights that it may change.

    `around` is what stands before and behind a changed array's path and not in that of a matrix;
    `unread` says why matrices of arrays that nothing reads, which are filled in, are carried,
    `scanned` why scanned layers take none, and `experts` why batched experts take none.
    """

    around: tuple[str, str]
    a: MatrixForm
    b: MatrixForm
    targets: tuple[str, ...]
    unread: str | None
    scanned: str | None
    experts: str | None

    def array(self, path: str) -> str:
        """What `{array}` stands for, of the path of a changed array."""
        before, behind = self.around
        return path.removeprefix(before).removesuffix(behind)


@dataclass(frozen=True)
class Files:
    """What a checkpoint consists of beside an Orbax tree, as patterns of names in its folder.

    A file for each that is `needed` is always there, and a checkpoint that is no Orbax tree is
    known by it; one that is `allowed` may be there.
    """

    needed: tuple[str, ...]
    allowed: tuple[str, ...]


@dataclass(frozen=True)
class Inventory:
    """mappings/huggingface.toml: every tensor of the Hugging Face layout."""

    rows: tuple[HFRow, ...]
    spellings: Spellings

    def row(self, name: str) -> HFRow | None:
        return next((row for row in self.rows if row.view.pattern.text == name), None)


@dataclass(frozen=True)
class Table:
    """One native layout: rows, what it carries and refuses, spellings of axes, placements.

    `version` is that of the framework, None where the table knows no versions. `files` is None for
    a layout whose checkpoints are Orbax trees.
    """

    layout: str
    version: str | None
    rows: tuple[NativeRow, ...]
    carried: tuple[CarriedRow, ...]
    refused: tuple[Refusal, ...]
    spellings: Spellings
    placements: Mapping[str, Placement]
    files: Files | None
    inventory: Inventory
    adapter: AdapterForm | None = None
    no_adapter: str | None = None
    """Why the framework has no adapters that could be converted, where that is known."""

    @cached_property
    def _rows_by_hf(self) -> Mapping[str, tuple[NativeRow, ...]]:
        rows: dict[str, tuple[NativeRow, ...]] = {}
        for row in self.rows:
            name = row.hf.view.pattern.text
            rows[name] = (*rows.get(name, ()), row)
        return rows

    @cached_property
    def _tower_names(self) -> tuple[str, ...]:
        texts = {row.native.pattern.text for row in self.rows if row.tower is not None}
        return tuple(text.partition("{")[0] for text in texts)

    def in_tower(self, name: str) -> bool:
        """Whether a native array belongs to the vision or audio tower."""
        return name.startswith(self._tower_names)

    def rows_of(self, hf: HFRow) -> tuple[NativeRow, ...]:
        """The rows that convert a Hugging Face row; at most one of them holds at a place."""
        return self._rows_by_hf.get(hf.view.pattern.text, ())
