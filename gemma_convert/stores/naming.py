"""Names of tensors as programs wrap them, and as a Gemma 4 checkpoint has them.

torch.compile puts `_orig_mod.` into names, DataParallel and its kind `module.` before them, PEFT
`base_model.model.`; `Gemma4Model.save_pretrained` leaves `model.` out, and older checkpoints have
`language_model.model.` where newer ones have `model.language_model.`. The values are the same, so
they are read under the names of google/gemma-4-*, and written under their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.stores.safetensors_header import StoredTensor

WRAPPERS = ("module.", "base_model.model.")
_COMPILED = "_orig_mod."
_BASE, _HEAD = "model.", "lm_head."
_IN_BASE = {
    *("language_model", "vision_tower", "audio_tower", "embed_vision", "embed_audio"),
    *("vision_embedder", "audio_embedder", "layers", "norm", "embed_tokens"),
    *("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"),
}
"""What the base models of transformers consist of, the whole one and the text model alone."""

_OLD_TEXT, _OLD_HEAD = "language_model.model.", "language_model.lm_head."


@dataclass(frozen=True)
class Naming:
    """How the tensors of a checkpoint are named. `wrappers` says it in words for the manifest."""

    stored: Mapping[str, str]
    """Name that the tables have → name in the files."""
    wrappers: tuple[str, ...]

    @property
    def plain(self) -> bool:
        return not self.wrappers

    @property
    def canonical(self) -> dict[str, str]:
        """Name in the files → name that the tables have."""
        return {stored: name for name, stored in self.stored.items()}


def find_naming(names: Iterable[str], where: Path) -> Naming:
    """How all of `names` are to be read; raises SourceError where two of them become one."""
    listed = list(names)
    read, wrappers = list(listed), []
    if any(_COMPILED in name for name in read):
        read = [name.replace(_COMPILED, "") for name in read]
        wrappers.append(_COMPILED)
    while wrapper := next((w for w in WRAPPERS if read and _all_begin(read, w)), None):
        read = [name.removeprefix(wrapper) for name in read]
        wrappers.append(wrapper)
    if any(name.startswith(_OLD_TEXT) for name in read):
        read = [_newer(name) for name in read]
        wrappers.append(_OLD_TEXT)
    elif read and all(name.partition(".")[0] in _IN_BASE for name in read):
        read = [_BASE + name for name in read]
        wrappers.append(f"without {_BASE}")
    stored: dict[str, str] = {}
    for name, file_name in zip(read, listed, strict=True):
        if name in stored:
            raise SourceError(
                "Two tensors have the same name but for what a program has put before it.",
                where=where,
                found=f"{stored[name]} and {file_name}",
                do="save the checkpoint again, from one model",
            )
        stored[name] = file_name
    return Naming(stored, tuple(wrappers))


def renamed(tensors: Iterable[StoredTensor], naming: Naming) -> tuple[StoredTensor, ...]:
    """The tensors of a file under the names that the tables have."""
    names = naming.canonical
    return tuple(replace(tensor, name=names[tensor.name]) for tensor in tensors)


def _all_begin(names: list[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _newer(name: str) -> str:
    if name.startswith(_OLD_TEXT):
        return f"{_BASE}language_model.{name.removeprefix(_OLD_TEXT)}"
    if name.startswith(_OLD_HEAD):
        return _HEAD + name.removeprefix(_OLD_HEAD)
    return name if name.startswith((_BASE, _HEAD)) else _BASE + name
