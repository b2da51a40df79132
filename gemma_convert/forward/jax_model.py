"""A native tree as the side of a check that JAX runs; layouts say what is particular to theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from gemma_convert.engine.joined import in_step
from gemma_convert.forward.adapted import AdaptedWeights, NativeChanges
from gemma_convert.forward.arithmetic import head
from gemma_convert.forward.decoder import final_hidden, stages
from gemma_convert.forward.decoder_weights import DecoderWeights
from gemma_convert.forward.encoder import Encoder, encoded
from gemma_convert.forward.jax_layout import ForwardPass, JaxLayout, Tower
from gemma_convert.forward.native_model import Batched, Dtype, Given, Logits, LogitSource, Streamed
from gemma_convert.forward.prompt import Prompt
from gemma_convert.forward.sharding import Axes, device_mesh, place, place_all, place_rows
from gemma_convert.forward.stored import StoredArray, read
from gemma_convert.forward.tree import Tree
from gemma_convert.model.architecture import Architecture, TextArchitecture
from gemma_convert.prompts.batches import batches, by_sequence, padded
from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.text import TokenSequence


class JaxModel:
    """A checkpoint in `folder`, run by JAX, with the `changes` that an adapter makes to it.

    Raises SourceError where it fits no `architecture`.
    """

    def __init__(
        self,
        folder: Path,
        architecture: Architecture,
        layout: JaxLayout,
        changes: NativeChanges | None = None,
    ) -> None:
        self.folder, self.layout, self.libraries = folder, layout.name, layout.libraries
        self._layout, self._architecture, self._changes = layout, architecture, changes
        facts = layout.facts(folder)
        layout.check_shapes(facts, architecture.text, folder)
        keys = {name.split("/", 1)[0] for name in facts}
        self.towers: Mapping[str, Callable[[SoftSequence], Encoder]] = {
            name: self._encoder
            for name, tower in layout.towers.items()
            if tower.parts[0][0] in keys
        }
        self.dtypes = frozenset(fact.dtype for fact in facts.values())
        self.scaled_dtype = facts[layout.embedding].dtype if layout.scaled else None

    @property
    def device_count(self) -> int:
        """How many devices JAX has, of all processes."""
        return jax.device_count()

    def run(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> LogitSource:
        text = self._architecture.text
        tree = self._whole(sequences)
        groups = batches(sequences)
        prompts = list(in_step(self._prompts(tree, groups, sequences)))
        forward = self._layout.forward
        states = final_hidden(self._weights(tree), text, prompts, dtype)
        hidden = {
            index: row
            for group, state in zip(groups, map(np.asarray, states), strict=True)
            for index, row in zip(group, state, strict=True)
        }
        table = forward.output_rows(forward.stored_table(tree, text), text, dtype)
        lengths = [len(sequence.ids) for sequence in sequences]
        return JaxLogits(text, table, hidden, lengths)

    def stream(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> Streamed:
        tree = self._layout.open(self.folder, self._modules(sequences))
        groups = batches(sequences)
        encoders = self._encoders(tree, sequences)
        prompts = list(in_step(self._prompts(encoders, groups, sequences)))
        text, forward = self._architecture.text, self._layout.forward
        weights = self._weights(tree)
        return JaxStream(text, forward, tree, weights, sequences, groups, prompts, dtype)

    def follow(
        self,
        sequences: Sequence[TokenSequence],
        dtype: Dtype,
        whole_model: bool,
        *,
        rows: int,
        vocab: Sequence[slice],
    ) -> None:
        """Makes the same calls of JAX as process 0 makes, in the same order."""
        if whole_model:
            ours = self.run(sequences, dtype)
            for index in range(len(sequences)):
                _exhaust(ours.slices(index, rows))
        else:
            stream = self.stream(sequences, dtype)
            _exhaust(stream.stages())
            _exhaust(stream.logits(vocab))

    def _weights(self, tree: Tree) -> DecoderWeights:
        text, changes = self._architecture.text, self._changes
        weights = self._layout.forward.weights(tree, text)
        return weights if changes is None else AdaptedWeights(weights, changes, len(text.layers))

    def _encoder(self, sequence: SoftSequence) -> Encoder:
        """The steps from what stands in a prompt to its soft tokens, their weights read anew."""
        tower = self._layout.towers[sequence.medium.tower]
        tree = self._layout.open(self.folder, sorted({module for module, *_ in tower.parts}))
        placed = self._encoders(tree, [sequence])
        return tower.encoder(placed, self._architecture, sequence)

    def _modules(self, sequences: Sequence[TokenSequence]) -> list[str]:
        """The keys of the tree that `sequences` need."""
        text = self._layout.forward.text_modules(self._architecture.text)
        return [*text, *(tower.parts[0][0] for tower in self._towers(sequences))]

    def _towers(self, sequences: Sequence[TokenSequence]) -> list[Tower]:
        """The towers that `sequences` need."""
        used = {one.medium.tower for one in sequences if isinstance(one, SoftSequence)}
        return [self._layout.towers[name] for name in sorted(used)]

    def _whole(self, sequences: Sequence[TokenSequence]) -> Tree:
        """The tree that `sequences` need: on the host, or split over several devices at once."""
        if device_mesh() is None:
            return self._layout.restore(self.folder, self._modules(sequences))
        axes = self._layout.axes(self._architecture.text)
        tree = self._layout.open(self.folder, self._modules(sequences))
        placed: Tree = place_all(tree, {**axes, **self._tower_axes(sequences)})
        return placed

    def _encoders(self, tree: Tree, sequences: Sequence[TokenSequence]) -> Tree:
        """The towers that `sequences` need, on the devices, where the tree has them."""
        found: dict[str, Any] = {}
        for tower in self._towers(sequences):
            for module, *keys in tower.parts:
                if not keys:
                    found[module] = tree[module]
                for key in keys:
                    below = {key: tree[module][key]} if key in tree[module] else {}
                    found[module] = {**found.get(module, {}), **below}
        placed: Tree = place_all(found, self._tower_axes(sequences))
        return placed

    def _tower_axes(self, sequences: Sequence[TokenSequence]) -> dict[str, Axes]:
        found: dict[str, Axes] = {}
        for tower in self._towers(sequences):
            found |= tower.axes(self._architecture)
        return found

    def _prompts(
        self,
        tree: Tree,
        groups: Sequence[Sequence[int]],
        sequences: Sequence[TokenSequence],
    ) -> Iterator[Prompt]:
        for group in groups:
            yield self._prompt(tree, [sequences[index] for index in group])

    def _prompt(self, tree: Tree, sequences: list[TokenSequence]) -> Prompt:
        tokens = padded([sequence.ids for sequence in sequences])
        first = sequences[0]
        if not isinstance(first, SoftSequence):
            return Prompt(tokens)
        places = np.zeros(tokens.shape, np.int64)
        places[0, : len(first.ids)] = first.places
        soft = np.zeros((*tokens.shape, self._architecture.text.embed), np.float32)
        encoder = self._layout.towers[first.medium.tower].encoder(tree, self._architecture, first)
        soft[places != 0] = np.asarray(encoded(encoder), np.float32)
        return Prompt(tokens, soft, places)


class JaxStream:
    """Prompts run layer by layer, over a tree whose arrays may still be in their files."""

    def __init__(
        self,
        text: TextArchitecture,
        forward: ForwardPass,
        tree: Tree,
        weights: DecoderWeights,
        sequences: Sequence[TokenSequence],
        groups: Sequence[Sequence[int]],
        prompts: Sequence[Prompt],
        dtype: Dtype,
    ) -> None:
        """`groups` are the numbers of the sequences that each of `prompts` holds, row by row."""
        self._text, self._forward, self._tree, self._dtype = text, forward, tree, dtype
        self._weights = weights
        self._sequences, self._groups, self._prompts = sequences, groups, prompts
        self._hidden: npt.NDArray[Any] | None = None

    @property
    def device(self) -> str:
        """Name of the devices that JAX runs on."""
        return _jax_device()

    def stages(self, given: Given | None = None) -> Iterator[list[Logits]]:
        """The states [length embed] in float32: embedded, behind each layer, behind the norm."""
        handed = (
            None
            if given is None
            else Batched(given, self._groups, self._sequences, place, np.asarray)
        )
        for states in in_step(
            stages(self._weights, self._text, self._prompts, self._dtype, handed)
        ):
            rows = self._rows(states)
            yield rows
        compared = [
            row[np.flatnonzero(one.compared)]
            for row, one in zip(rows, self._sequences, strict=True)
        ]
        if given is not None and given.rows is not None:
            compared.append(given.rows.astype(rows[0].dtype))
        self._hidden = np.concatenate(compared)[None]

    def _rows(self, states: Sequence[jax.Array]) -> list[Logits]:
        host = [np.asarray(state) for state in states]
        rows = by_sequence(host, self._groups, self._sequences)
        return [row.astype(np.float32, copy=False) for row in rows]

    def logits(self, vocab: Sequence[slice]) -> Iterator[Logits]:
        """Logits [positions width] of each slice of the vocabulary, of all compared positions."""
        if self._hidden is None:
            raise ValueError("stages have not come to their end")
        yield from in_step(self._slices(self._hidden, vocab))

    def _slices(self, hidden: npt.NDArray[Any], vocab: Sequence[slice]) -> Iterator[Logits]:
        states = place(hidden)
        table = _RowsInOrder(self._forward.stored_table(self._tree, self._text))
        for part in vocab:
            rows = self._forward.output_rows(table.placed(part), self._text, self._dtype)
            yield np.asarray(head(rows, states, self._text))[0]


class _RowsInOrder:
    """Rows of a table, slice by slice from the first one on; a large chunk is decoded once."""

    def __init__(self, table: Any) -> None:
        self._table, self._start, self._block = table, 0, table[0:0]

    def placed(self, part: slice) -> jax.Array:
        """The rows of `part` on the devices; a process reads those of its own devices alone."""
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
        length = self.lengths[index]
        for start in range(0, length, rows):
            hidden = place(self.hidden[index][None, start : start + rows])
            yield np.asarray(head(self.table, hidden, self.text))[0, : length - start]


def _exhaust(items: Iterable[object]) -> None:
    for _ in items:
        pass


def _jax_device() -> str:
    kind = str(jax.devices()[0].device_kind)
    return kind if jax.device_count() == 1 else f"{jax.device_count()} × {kind}"
