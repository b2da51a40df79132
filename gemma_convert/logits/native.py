"""The native side of a check: a checkpoint of any layout, run as its framework lays it out.

Trees are read by Orbax and files by safetensors; nothing here knows our mapping tables or stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_convert.architecture import Architecture, TextArchitecture
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.logits.images import ImageSequence
from gemma_convert.logits.limit import Dtype
from gemma_convert.logits.prompts import TokenSequence
from gemma_convert.logits.soft import SoftSequence
from gemma_convert.logits.sounds import SoundSequence
from gemma_convert.logits.streaming import Streamed
from gemma_convert.native.restore import (
    ArrayFacts,
    gemma_jax_facts,
    is_gemma_jax,
    maxtext_facts,
    open_gemma_jax,
    open_maxtext,
    restore_gemma_jax,
    restore_maxtext,
)
from gemma_convert.native.stored import StoredArray, read, read_all
from gemma_convert.stores.orbax_reader import find_items

if TYPE_CHECKING:
    import jax
    import torch

    from gemma_convert.native.fast_llm import FastLLM
    from gemma_convert.native.prompt import Prompt

Logits: TypeAlias = npt.NDArray[np.float32]

FAST_LLM_METADATA = "metadata.yaml"

_BUCKET = 64
_BATCH_TOKENS = 4096


class LogitSource(Protocol):
    """A side of the comparison: logits of a sequence in slices [positions vocab]."""

    @property
    def device(self) -> str:
        """Name of the device, for the report."""

    def slices(self, index: int, rows: int) -> Iterator[Logits]:
        """Logits of one sequence, at most `rows` positions at a time."""


class NativeModel(Protocol):
    """A native checkpoint that fits a model's config.json."""

    folder: Path
    layout: str
    libraries: tuple[str, ...]
    dtypes: frozenset[str]
    """Dtypes that its arrays have."""
    scaled_dtype: str | None
    """Dtype of an embedding that is stored × √embed; None where it is stored as it is."""
    towers: frozenset[str]
    """Towers that it holds: vision, audio."""

    def run(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> LogitSource:
        """The logits of `sequences`, of the whole model in memory.

        `check_towers` must have passed. Weights are dropped once the hidden states are known.
        """

    def stream(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> Streamed:
        """The same, layer by layer: a layer's weights are read when it runs, and dropped."""


def check_towers(model: NativeModel, sequences: Sequence[TokenSequence]) -> None:
    """Nothing where `model` sees and hears what is in `sequences`. Raises UsageError else."""
    for sequence in sequences:
        if isinstance(sequence, SoftSequence) and sequence.medium.tower not in model.towers:
            medium = sequence.medium
            raise UsageError(
                f"The native checkpoint is without the {medium.tower} tower, so it "
                f"{medium.senses} no {medium.many}.",
                where=model.folder,
                found=f"layout {model.layout}",
                do=f"leave out {medium.option}, or convert with the tower, to a layout that has it",
            )


def open_model(native: Path, architecture: Architecture) -> NativeModel:
    """The checkpoint at `native`; raises SourceError where it does not fit `architecture`."""
    if (native / FAST_LLM_METADATA).is_file():
        return FastLLMModel(native, architecture)
    items = find_items(native)
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
        """The module of the tree's forward pass, `""`, or that of a `part` such as `_vision`."""
        from importlib import import_module

        return import_module(f"gemma_convert.native.{self.layout.replace('-', '_')}{part}")


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
        tree.module("_shapes").check_shapes(facts, architecture.text, items)
        keys = {name.split("/", 1)[0] for name in facts}
        self.towers = frozenset(tower for tower, ((key,), *_) in tree.towers.items() if key in keys)
        self.dtypes = frozenset(fact.dtype for fact in facts.values())
        self.scaled_dtype = facts[tree.embedding].dtype if tree.scaled else None

    def run(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> LogitSource:
        text = self._architecture.text
        tree = self._tree.restore(self.folder, self._modules(sequences))
        groups = _batches(sequences)
        prompts = [self._prompt(tree, [sequences[index] for index in group]) for group in groups]
        states = self._tree.module("").final_hidden(tree, text, prompts, dtype)
        hidden = {
            index: state[row]
            for group, state in zip(groups, states, strict=True)
            for row, index in enumerate(group)
        }
        table = self._tree.module("").output_table(tree, text, dtype)
        lengths = [len(sequence.ids) for sequence in sequences]
        return JaxLogits(text, table, hidden, lengths)

    def stream(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> Streamed:
        tree = self._tree.open(self.folder, self._modules(sequences))
        groups = _batches(sequences)
        encoders = self._encoders(tree, sequences)
        prompts = [
            self._prompt(encoders, [sequences[index] for index in group]) for group in groups
        ]
        text, module = self._architecture.text, self._tree.module("")
        return JaxStream(text, module, tree, sequences, groups, prompts, dtype)

    def _modules(self, sequences: Sequence[TokenSequence]) -> list[str]:
        """The keys of the tree that `sequences` need."""
        text = self._tree.module("").text_modules(self._architecture.text)
        return [*text, *(self._tree.towers[tower][0][0] for tower in _used_towers(sequences))]

    def _encoders(
        self, tree: Mapping[str, Any], sequences: Sequence[TokenSequence]
    ) -> Mapping[str, Any]:
        """The arrays, read, of the towers that `sequences` need, where the tree has them."""
        found: dict[str, Any] = {}
        for tower in _used_towers(sequences):
            for module, *keys in self._tree.towers[tower]:
                if not keys:
                    found[module] = read_all(tree[module])
                for key in keys:
                    below = {key: read_all(tree[module][key])} if key in tree[module] else {}
                    found[module] = {**found.get(module, {}), **below}
        return found

    def _prompt(self, tree: Mapping[str, Any], sequences: list[TokenSequence]) -> Prompt:
        from gemma_convert.native.prompt import Prompt

        tokens = _padded([sequence.ids for sequence in sequences])
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
        module = self._tree.module(f"_{sequence.medium.tower}")
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
        self._hidden: jax.Array | None = None

    @property
    def device(self) -> str:
        """Name of the first device that JAX runs on."""
        return _jax_device()

    def stages(self) -> Iterator[list[Logits]]:
        """The states [length embed] in float32: embedded, behind each layer, behind the norm."""
        import jax.numpy as jnp

        for states in self._module.stages(self._tree, self._text, self._prompts, self._dtype):
            rows = _by_sequence(states, self._groups, self._sequences)
            yield [np.asarray(row.astype(jnp.float32)) for row in rows]
        compared = [
            row[np.flatnonzero(one.compared)]
            for row, one in zip(rows, self._sequences, strict=True)
        ]
        self._hidden = jnp.concatenate(compared)[None]

    def logits(self, vocab: Sequence[slice]) -> Iterator[Logits]:
        """Logits [positions width] of each slice of the vocabulary, of all compared positions."""
        from gemma_convert.native.arithmetic import head

        if self._hidden is None:
            raise ValueError("stages have not come to their end")
        table = _Forward(self._module.stored_table(self._tree))
        for part in vocab:
            rows = self._module.output_rows(table.rows(part), self._text, self._dtype)
            yield np.asarray(head(rows, self._hidden, self._text))[0]


class _Forward:
    """Rows of a table, slice by slice from the first one on; a large chunk is decoded once."""

    def __init__(self, table: Any) -> None:
        self._table, self._start, self._block = table, 0, table[0:0]

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
    hidden: Mapping[int, jax.Array]
    lengths: Sequence[int]

    @property
    def device(self) -> str:
        """Name of the first device that JAX runs on."""
        return _jax_device()

    def slices(self, index: int, rows: int) -> Iterator[Logits]:
        """Logits of one sequence, at most `rows` positions at a time, [positions vocab] each."""
        from gemma_convert.native.arithmetic import head

        length = self.lengths[index]
        for start in range(0, length, rows):
            hidden = self.hidden[index][None, start : start + rows]
            yield np.asarray(head(self.table, hidden, self.text))[0, : length - start]


class FastLLMModel:
    """A checkpoint in Fast-LLM's own format, run by PyTorch from its own metadata."""

    layout = "fast-llm"
    libraries: tuple[str, ...] = ("torch", "safetensors")
    scaled_dtype: str | None = None
    towers: frozenset[str] = frozenset()

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        from gemma_convert.native.fast_llm import FastLLM

        self.folder = folder
        model = FastLLM(folder)
        self.dtypes = model.stored_dtypes
        if model.config.vocab_size != architecture.text.vocab:
            raise SourceError(
                "The native checkpoint does not fit config.json.",
                where=folder / FAST_LLM_METADATA,
                expected=f"vocab_size {architecture.text.vocab}",
                found=model.config.vocab_size,
                do="give the config.json of the model that was converted",
            )

    def run(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> LogitSource:
        from gemma_convert.native.fast_llm import FastLLM

        model = FastLLM(self.folder, dtype)
        groups = _batches(sequences)
        states = model.final_hidden(
            [_padded([sequences[index].ids for index in group]) for group in groups]
        )
        hidden = {
            index: state[row]
            for group, state in zip(groups, states, strict=True)
            for row, index in enumerate(group)
        }
        return TorchLogits(model, hidden, [len(sequence.ids) for sequence in sequences])

    def stream(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> Streamed:
        from gemma_convert.native.fast_llm import FastLLM

        return TorchStream(FastLLM(self.folder, dtype), sequences)


class TorchStream:
    """Sequences run layer by layer, weights read from their files when they are needed."""

    def __init__(self, model: FastLLM, sequences: Sequence[TokenSequence]) -> None:
        self._model, self._sequences = model, sequences
        self._hidden: torch.Tensor | None = None

    @property
    def device(self) -> str:
        """Name of the device that the model runs on."""
        return self._model.device_name

    def stages(self) -> Iterator[list[Logits]]:
        """The states [length embed] in float32: embedded, behind each layer, behind the norm."""
        import torch

        groups = _batches(self._sequences)
        batches = [_padded([self._sequences[index].ids for index in group]) for group in groups]
        for states in self._model.stages(batches):
            rows = _by_sequence(states, groups, self._sequences)
            yield [row.float().cpu().numpy() for row in rows]
        self._hidden = torch.cat(rows)

    def logits(self, vocab: Sequence[slice]) -> Iterator[Logits]:
        """Logits [positions width] of each slice of the vocabulary, of all positions."""
        import torch

        if self._hidden is None:
            raise ValueError("stages have not come to their end")
        for part in vocab:
            with torch.no_grad():
                logits: Logits = self._model.head(self._hidden, part).cpu().numpy()
            yield logits


@dataclass(frozen=True)
class TorchLogits:
    """Hidden states [positions embed] of sequences, and the model whose head they go through."""

    model: FastLLM
    hidden: Mapping[int, torch.Tensor]
    lengths: Sequence[int]

    @property
    def device(self) -> str:
        """Name of the device that the model runs on."""
        return self.model.device_name

    def slices(self, index: int, rows: int) -> Iterator[Logits]:
        """Logits of one sequence, at most `rows` positions at a time, [positions vocab] each."""
        import torch

        for start in range(0, self.lengths[index], rows):
            hidden = self.hidden[index][start : min(start + rows, self.lengths[index])]
            with torch.no_grad():
                yield self.model.head(hidden).cpu().numpy()


def _used_towers(sequences: Sequence[TokenSequence]) -> list[str]:
    return sorted({one.medium.tower for one in sequences if isinstance(one, SoftSequence)})


def _jax_device() -> str:
    import jax

    device = jax.devices()[0]
    return str(device.device_kind)


def _by_sequence(
    states: Sequence[Any], groups: Sequence[Sequence[int]], sequences: Sequence[TokenSequence]
) -> list[Any]:
    """The states [length embed] of each sequence, from those of the groups that they ran in."""
    found = {
        index: state[row, : len(sequences[index].ids)]
        for state, group in zip(states, groups, strict=True)
        for row, index in enumerate(group)
    }
    return [found[index] for index in range(len(sequences))]


def _batches(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Numbers of the sequences that run together: those of one padded length, a bounded number.

    One with an image or a sound runs by itself.
    """
    alone = [[n] for n, sequence in enumerate(sequences) if isinstance(sequence, SoftSequence)]
    groups: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        if not isinstance(sequence, SoftSequence):
            length = -(-len(sequence.ids) // _BUCKET) * _BUCKET
            groups.setdefault(length, []).append(index)
    together = [
        group[start : start + max(1, _BATCH_TOKENS // padded)]
        for padded, group in groups.items()
        for start in range(0, len(group), max(1, _BATCH_TOKENS // padded))
    ]
    return together + alone


def _padded(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """Ids [batch length], filled up with each row's last id, which no earlier position can see."""
    length = -(-max(map(len, rows)) // _BUCKET) * _BUCKET
    filled = [[*row, *[row[-1]] * (length - len(row))] for row in rows]
    return np.array(filled, np.int32)
