"""Fast-LLM's checkpoints as the native side of a check, run by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from gemma_convert.errors import SourceError
from gemma_convert.forward.encoder import Encoder
from gemma_convert.forward.native_model import Batched, Dtype, Given, Logits, LogitSource, Streamed
from gemma_convert.layouts.fast_llm.forward import FastLLM
from gemma_convert.layouts.fast_llm.forward_config import METADATA
from gemma_convert.model.architecture import Architecture
from gemma_convert.prompts.batches import batches, by_sequence, padded
from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.text import TokenSequence


class FastLLMModel:
    """A checkpoint in Fast-LLM's own format, run by PyTorch from its own metadata."""

    layout = "fast-llm"
    libraries: tuple[str, ...] = ("torch", "safetensors")
    scaled_dtype: str | None = None
    towers: Mapping[str, Callable[[SoftSequence], Encoder]] = MappingProxyType({})
    device_count = 1

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder = folder
        model = FastLLM(folder)
        self.dtypes = model.stored_dtypes
        if model.config.vocab_size != architecture.text.vocab:
            raise SourceError(
                "The native checkpoint does not fit config.json.",
                where=folder / METADATA,
                expected=f"vocab_size {architecture.text.vocab}",
                found=model.config.vocab_size,
                do="give the config.json of the model that was converted",
            )

    def run(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> LogitSource:
        model = FastLLM(self.folder, dtype)
        groups = batches(sequences)
        states = model.final_hidden(
            [padded([sequences[index].ids for index in group]) for group in groups]
        )
        hidden = {
            index: state[row]
            for group, state in zip(groups, states, strict=True)
            for row, index in enumerate(group)
        }
        return TorchLogits(model, hidden, [len(sequence.ids) for sequence in sequences])

    def stream(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> Streamed:
        return TorchStream(FastLLM(self.folder, dtype), sequences)

    def follow(self, *_: object, **__: object) -> None:
        """Nothing: it runs in process 0 alone."""


class TorchStream:
    """Sequences run layer by layer, weights read from their files when they are needed."""

    def __init__(self, model: FastLLM, sequences: Sequence[TokenSequence]) -> None:
        self._model, self._sequences = model, sequences
        self._hidden: torch.Tensor | None = None

    @property
    def device(self) -> str:
        """Name of the device that the model runs on."""
        return self._model.device_name

    def stages(self, given: Given | None = None) -> Iterator[list[Logits]]:
        """The states [length embed] in float32: embedded, behind each layer, behind the norm."""
        groups = batches(self._sequences)
        tokens = [padded([self._sequences[index].ids for index in group]) for group in groups]
        handed = (
            None
            if given is None
            else Batched(given, groups, self._sequences, torch.from_numpy, _host)
        )
        for states in self._model.stages(tokens, handed):
            rows = by_sequence(states, groups, self._sequences)
            yield _on_host(rows)
        if given is not None and given.rows is not None:
            rows.append(torch.from_numpy(given.rows).to(rows[0]))
        self._hidden = torch.cat(rows)

    def logits(self, vocab: Sequence[slice]) -> Iterator[Logits]:
        """Logits [positions width] of each slice of the vocabulary, of all positions."""
        if self._hidden is None:
            raise ValueError("stages have not come to their end")
        for part in vocab:
            with torch.no_grad():
                logits: Logits = self._model.head(self._hidden, part).cpu().numpy()
            yield logits


def _on_host(rows: Sequence[torch.Tensor]) -> list[Logits]:
    return [_host(row) for row in rows]


def _host(values: torch.Tensor) -> Logits:
    array: Logits = values.float().cpu().numpy()
    return array


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
        for start in range(0, self.lengths[index], rows):
            hidden = self.hidden[index][start : min(start + rows, self.lengths[index])]
            with torch.no_grad():
                yield self.model.head(hidden).cpu().numpy()
