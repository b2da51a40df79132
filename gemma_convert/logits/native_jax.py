"""MaxText's and the gemma library's trees as the native side of a check, run by JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.restore import (
    ArrayFacts,
    gemma_jax_facts,
    is_gemma_jax,
    maxtext_facts,
    open_gemma_jax,
    open_maxtext,
    restore_gemma_jax,
    restore_maxtext,
)
from gemma_convert.forward.stored import StoredArray, read
from gemma_convert.logits.batches import batches, by_sequence, padded
from gemma_convert.logits.distributed import in_step
from gemma_convert.logits.images import ImageSequence
from gemma_convert.logits.limit import Dtype
from gemma_convert.logits.native import Logits, LogitSource
from gemma_convert.logits.prompts import TokenSequence
from gemma_convert.logits.soft import SoftSequence
from gemma_convert.logits.sounds import SoundSequence
from gemma_convert.logits.streaming import Streamed
from gemma_convert.model.architecture import Architecture, TextArchitecture

if TYPE_CHECKING:
    import jax

    from gemma_convert.forward.prompt import Prompt
    from gemma_convert.forward.sharding import Axes


def jax_model(items: Path, architecture: Architecture) -> JaxModel:
    """The tree in an Orbax item folder; raises SourceError where it does not fit."""
    return JaxModel(items, architecture, _GEMMA_JAX if is_gemma_jax(items) else _MAXTEXT)


@dataclass(frozen=True)
class _Tree:
    """What is particular to one tree: its modules are imported by name, when they are needed."""

    layout: str
    embedding: str
    scaled: bool
    towers: Mapping[str, tuple[tuple[str, ...], ...]]
    """Tower → the keys of its own module, and of what belongs to it elsewhere."""
    facts: Callable[[Path], Mapping[str, ArrayFacts]]
    restore: Callable[[Path, Sequence[str] | None], Mapping[str, Any]]
    open: Callable[[Path, Sequence[str] | None], Mapping[str, Any]]
    """The same tree, its arrays still in their files."""

    def module(self, part: str) -> Any:
        """A module of the layout's folder: `forward`, `shapes`, or that of a tower."""
        from importlib import import_module

        return import_module(f"gemma_convert.layouts.{self.layout.replace('-', '_')}.{part}")


_MAXTEXT = _Tree(
    layout="maxtext",
    embedding="token_embedder/embedding",
    scaled=True,
    towers={"vision": (("vision_encoder",),)},
    facts=maxtext_facts,
    restore=restore_maxtext,
    open=open_maxtext,
)
_GEMMA_JAX = _Tree(
    layout="gemma-jax",
    embedding="embedder/input_embedding",
    scaled=False,
    towers={
        "vision": (("vision_encoder",), ("embedder", "mm_input_projection")),
        "audio": (("audio_encoder",), ("embedder", "audio_input_projection")),
    },
    facts=gemma_jax_facts,
    restore=restore_gemma_jax,
    open=open_gemma_jax,
)


class JaxModel:
    """A tree in an Orbax checkpoint, run by JAX."""

    libraries: tuple[str, ...] = ("jax", "orbax-checkpoint")

    def __init__(self, items: Path, architecture: Architecture, tree: _Tree) -> None:
        self.folder, self.layout = items, tree.layout
        self._tree, self._architecture = tree, architecture
        facts = tree.facts(items)
        tree.module("shapes").check_shapes(facts, architecture.text, items)
        keys = {name.split("/", 1)[0] for name in facts}
        self.towers = frozenset(tower for tower, ((key,), *_) in tree.towers.items() if key in keys)
        self.dtypes = frozenset(fact.dtype for fact in facts.values())
        self.scaled_dtype = facts[tree.embedding].dtype if tree.scaled else None

    def run(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> LogitSource:
        text = self._architecture.text
        tree = self._whole(sequences)
        groups = batches(sequences)
        prompts = list(in_step(self._prompts(tree, groups, sequences)))
        states = self._tree.module("forward").final_hidden(tree, text, prompts, dtype)
        hidden = {
            index: row
            for group, state in zip(groups, map(np.asarray, states), strict=True)
            for index, row in zip(group, state, strict=True)
        }
        table = self._tree.module("forward").output_table(tree, text, dtype)
        lengths = [len(sequence.ids) for sequence in sequences]
        return JaxLogits(text, table, hidden, lengths)

    def stream(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> Streamed:
        tree = self._tree.open(self.folder, self._modules(sequences))
        groups = batches(sequences)
        encoders = self._encoders(tree, sequences)
        prompts = list(in_step(self._prompts(encoders, groups, sequences)))
        text, module = self._architecture.text, self._tree.module("forward")
        return JaxStream(text, module, tree, sequences, groups, prompts, dtype)

    def _modules(self, sequences: Sequence[TokenSequence]) -> list[str]:
        """The keys of the tree that `sequences` need."""
        text = self._tree.module("forward").text_modules(self._architecture.text)
        return [*text, *(self._tree.towers[tower][0][0] for tower in _used_towers(sequences))]

    def _whole(self, sequences: Sequence[TokenSequence]) -> Mapping[str, Any]:
        """The tree that `sequences` need: on the host, or split over several devices at once."""
        from gemma_convert.forward.sharding import device_mesh, place_all

        if device_mesh() is None:
            return self._tree.restore(self.folder, self._modules(sequences))
        axes = self._tree.module("shapes").text_axes(self._architecture.text)
        tree = self._tree.open(self.folder, self._modules(sequences))
        placed: Mapping[str, Any] = place_all(tree, axes | self._tower_axes(sequences))
        return placed

    def _encoders(
        self, tree: Mapping[str, Any], sequences: Sequence[TokenSequence]
    ) -> Mapping[str, Any]:
        """The towers that `sequences` need, on the devices, where the tree has them."""
        from gemma_convert.forward.sharding import place_all

        found: dict[str, Any] = {}
        for tower in _used_towers(sequences):
            for module, *keys in self._tree.towers[tower]:
                if not keys:
                    found[module] = tree[module]
                for key in keys:
                    below = {key: tree[module][key]} if key in tree[module] else {}
                    found[module] = {**found.get(module, {}), **below}
        placed: Mapping[str, Any] = place_all(found, self._tower_axes(sequences))
        return placed

    def _tower_axes(self, sequences: Sequence[TokenSequence]) -> dict[str, Axes]:
        found: dict[str, Axes] = {}
        for tower in _used_towers(sequences):
            found |= self._tree.module(tower).axes(self._architecture)
        return found

    def _prompts(
        self,
        tree: Mapping[str, Any],
        groups: Sequence[Sequence[int]],
        sequences: Sequence[TokenSequence],
    ) -> Iterator[Prompt]:
        for group in groups:
            yield self._prompt(tree, [sequences[index] for index in group])

    def _prompt(self, tree: Mapping[str, Any], sequences: list[TokenSequence]) -> Prompt:
        from gemma_convert.forward.prompt import Prompt

        tokens = padded([sequence.ids for sequence in sequences])
        first = sequences[0]
        if not isinstance(first, ImageSequence | SoundSequence):
            return Prompt(tokens)
        places = np.zeros(tokens.shape, np.int64)
        places[0, : len(first.ids)] = first.places
        soft = np.zeros((*tokens.shape, self._architecture.text.embed), np.float32)
        soft[places != 0] = np.asarray(self._encoded(tree, first), np.float32)
        return Prompt(tokens, soft, places)

    def _encoded(self, tree: Mapping[str, Any], sequence: ImageSequence | SoundSequence) -> Any:
        """The soft tokens of the image or the sound [soft_tokens embed]."""
        module = self._tree.module(sequence.medium.tower)
        if isinstance(sequence, ImageSequence):
            return module.encode_image(
                tree, self._architecture, sequence.pixels, sequence.positions
            )
        return module.encode_audio(tree, self._architecture, sequence.features)


class JaxStream:
    """Prompts run layer by layer, over a tree whose arrays may still be in their files."""

    def __init__(
        self,
        text: TextArchitecture,
        module: Any,
        tree: Mapping[str, Any],
        sequences: Sequence[TokenSequence],
        groups: Sequence[Sequence[int]],
        prompts: Sequence[Prompt],
        dtype: Dtype,
    ) -> None:
        """`groups` are the numbers of the sequences that each of `prompts` holds, row by row."""
        self._text, self._module, self._tree, self._dtype = text, module, tree, dtype
        self._sequences, self._groups, self._prompts = sequences, groups, prompts
        self._hidden: npt.NDArray[Any] | None = None

    @property
    def device(self) -> str:
        """Name of the devices that JAX runs on."""
        return _jax_device()

    def stages(self) -> Iterator[list[Logits]]:
        """The states [length embed] in float32: embedded, behind each layer, behind the norm."""
        stages = self._module.stages(self._tree, self._text, self._prompts, self._dtype)
        for states in in_step(stages):
            host = [np.asarray(state) for state in states]
            rows = by_sequence(host, self._groups, self._sequences)
            yield [row.astype(np.float32, copy=False) for row in rows]
        compared = [
            row[np.flatnonzero(one.compared)]
            for row, one in zip(rows, self._sequences, strict=True)
        ]
        self._hidden = np.concatenate(compared)[None]

    def logits(self, vocab: Sequence[slice]) -> Iterator[Logits]:
        """Logits [positions width] of each slice of the vocabulary, of all compared positions."""
        if self._hidden is None:
            raise ValueError("stages have not come to their end")
        yield from in_step(self._slices(self._hidden, vocab))

    def _slices(self, hidden: npt.NDArray[Any], vocab: Sequence[slice]) -> Iterator[Logits]:
        from gemma_convert.forward.arithmetic import head
        from gemma_convert.forward.sharding import place

        states = place(hidden)
        table = _Forward(self._module.stored_table(self._tree))
        for part in vocab:
            rows = self._module.output_rows(table.placed(part), self._text, self._dtype)
            yield np.asarray(head(rows, states, self._text))[0]


class _Forward:
    """Rows of a table, slice by slice from the first one on; a large chunk is decoded once."""

    def __init__(self, table: Any) -> None:
        self._table, self._start, self._block = table, 0, table[0:0]

    def placed(self, part: slice) -> jax.Array:
        """The rows of `part` on the devices; a process reads those of its own devices alone."""
        from gemma_convert.forward.sharding import place_rows

        width = part.stop - part.start
        return place_rows(
            (width, *self._table.shape[1:]),
            lambda first, last: self.rows(slice(part.start + first, part.start + last)),
        )

    def rows(self, part: slice) -> Any:
        """The rows of `part`, whose ends are numbers within the table."""
        if not isinstance(self._table, StoredArray):
            return self._table[part]
        if not self._start <= part.start <= part.stop <= self._start + len(self._block):
            chunk = self._table.chunk_rows
            self._block = None
            self._start = part.start // chunk * chunk
            stop = min(-(-part.stop // chunk) * chunk, len(self._table))
            self._block = read(self._table[self._start : stop])
        return self._block[part.start - self._start : part.stop - self._start]


@dataclass(frozen=True)
class JaxLogits:
    """Hidden states [positions embed] of sequences, and the table that makes logits of them."""

    text: TextArchitecture
    table: jax.Array
    hidden: Mapping[int, npt.NDArray[Any]]
    lengths: Sequence[int]

    @property
    def device(self) -> str:
        """Name of the devices that JAX runs on."""
        return _jax_device()

    def slices(self, index: int, rows: int) -> Iterator[Logits]:
        """Logits of one sequence, at most `rows` positions at a time, [positions vocab] each."""
        yield from in_step(self._slices(index, rows))

    def _slices(self, index: int, rows: int) -> Iterator[Logits]:
        from gemma_convert.forward.arithmetic import head
        from gemma_convert.forward.sharding import place

        length = self.lengths[index]
        for start in range(0, length, rows):
            hidden = place(self.hidden[index][None, start : start + rows])
            yield np.asarray(head(self.table, hidden, self.text))[0, : length - start]


def _used_towers(sequences: Sequence[TokenSequence]) -> list[str]:
    return sorted({one.medium.tower for one in sequences if isinstance(one, SoftSequence)})


def _jax_device() -> str:
    import jax

    kind = str(jax.devices()[0].device_kind)
    return kind if jax.device_count() == 1 else f"{jax.device_count()} × {kind}"
