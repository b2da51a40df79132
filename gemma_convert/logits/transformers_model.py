"""A second Hugging Face checkpoint in the native side's place: transformers runs it as well.

So what another converter made can be judged. Both sides are run by the same code, each by its own
config.json, so that nothing but weights and facts can differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from gemma_convert.engine.joined import process_count
from gemma_convert.errors import SourceError, UsageError, short
from gemma_convert.forward.native_model import Dtype, LogitSource, Staged
from gemma_convert.logits.layerwise import LayerwiseReference
from gemma_convert.logits.reference import TransformersLogits
from gemma_convert.logits.sizes import check_sizes
from gemma_convert.mapping.table import HUGGINGFACE
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.text import TokenSequence
from gemma_convert.stores.safetensors.reader import SafetensorsFolder

NO_PARTS = (
    "transformers ran both models, so parts were not compared: only the KL decides. It is 0 "
    "where weights and config.json are the same."
)


class TransformersModel:
    """A Hugging Face checkpoint that is compared with another one."""

    layout: str = HUGGINGFACE
    libraries: tuple[str, ...] = ("torch", "transformers")
    scaled_dtype: str | None = None
    device_count = 1

    def __init__(self, folder: Path, original: Architecture) -> None:
        """Raises SourceError where it is another model than `original`, or is broken."""
        if process_count() > 1:
            raise UsageError("Two Hugging Face checkpoints are compared by one process.")
        self.folder, self._original = folder, original
        self.architecture = read_architecture(folder)
        check_sizes(folder, self.architecture)
        with SafetensorsFolder(folder) as reader:
            self.dtypes = frozenset(spec.dtype for spec in reader.specs.values())
        sees = self.architecture.vision or self.architecture.vision_embedder
        hears = self.architecture.audio or self.architecture.audio_embedder
        self.towers = frozenset(
            name for name, tower in (("vision", sees), ("audio", hears)) if tower
        )
        self._check_same_model()

    @property
    def differences(self) -> Iterator[str]:
        """Facts of the language model that the two config.json say otherwise, as sentences."""
        ours, theirs = self.architecture.text, self._original.text
        for fact in fields(ours):
            here, there = getattr(ours, fact.name), getattr(theirs, fact.name)
            if here != there and fact.name != "layers":
                yield (
                    f"The two models run with different settings: {fact.name} is {short(here)} in "
                    f"{self.folder.name}, {short(there)} in the original."
                )

    def run(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> LogitSource:
        _check_dtype(dtype)
        return TransformersLogits(self.folder, sequences)

    def stream(self, sequences: Sequence[TokenSequence], dtype: Dtype) -> Staged:
        _check_dtype(dtype)
        return LayerwiseReference(self.folder, sequences)

    def _check_same_model(self) -> None:
        ours, theirs = self.architecture.text, self._original.text
        sides = [(len(text.layers), text.embed, text.vocab) for text in (theirs, ours)]
        if sides[0] != sides[1]:
            words = ["{} layers, embed {}, vocab {}".format(*side) for side in sides]
            raise SourceError(
                "The two checkpoints do not belong to the same model.",
                where=self.folder,
                expected=words[0],
                found=words[1],
            )


def _check_dtype(dtype: Dtype) -> None:
    if dtype != "float32":
        raise UsageError(
            "Two Hugging Face checkpoints are compared in float32.", do="leave out --dtype"
        )
