"""Names of tensors as programs wrap them, and as a Gemma 4 checkpoint has them.

torch.compile puts `_orig_mod.` into names, DataParallel and its kind `module.` before them, PEFT
`base_model.model.`; `Gemma4Model.save_pretrained` leaves `model.` out, and older checkpoints have
`language_model.model.` where newer ones have `model.language_model.`; the modules of 12B in
transformers have other names than its files (`gemma4_unified` in `conversion_mapping.py`, 5.23).
The values are the same, so they are read under the names of google/gemma-4-*, and written under
their own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.stores.safetensors.header import StoredTensor

_WRAPPER = re.compile(r"_orig_mod\.|module\.|base_model\.model\.")
_WRAPPERS = re.compile(f"(?:{_WRAPPER.pattern})*")
_INSIDE = re.compile(r"(?<=\.)(?:_orig_mod\.)+")
_BASE, _HEAD = "model.", "lm_head."
_IN_BASE = {
    *("language_model", "vision_tower", "audio_tower", "embed_vision", "embed_audio"),
    *("vision_embedder", "audio_embedder", "layers", "norm", "embed_tokens"),
    *("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"),
}
"""What the base models of transformers consist of, the whole one and the text model alone."""

_OLD_TEXT, _OLD_HEAD = "language_model.model.", "language_model.lm_head."
_NEW_TEXT = "model.language_model."

_EMBEDDER, _PROJECTION = "model.vision_embedder.", "embed_vision.multimodal_embedder."
_EMBEDDER_MODULES = re.compile(r"^model\.embed_vision\.(?=patch_|pos_)")


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
    head = _shared_head(listed)
    wrappers = _WRAPPER.findall(head)
    read = [name.removeprefix(head) for name in listed]
    for words, reading in _READINGS.items():
        names_read = reading(read)
        if names_read != read:
            read = names_read
            wrappers.append(words)
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


def _shared_head(names: list[str]) -> str:
    """The wrappers that stand before every one of `names`: those that the extremes share."""
    heads = [match[0] for name in names if (match := _WRAPPERS.match(name))]
    first, last = (_WRAPPER.findall(pick(heads, default="")) for pick in (min, max))
    both = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(wrapper for wrapper, _ in both)


def _without_inner(names: list[str]) -> list[str]:
    return [_INSIDE.sub("", name) for name in names]


def _of_whole_model(names: list[str]) -> list[str]:
    if all(name.partition(".")[0] in _IN_BASE for name in names) and not _are_older(names):
        return [_BASE + name for name in names]
    return names


def _newer(names: list[str]) -> list[str]:
    return [_newer_name(name) for name in names] if _are_older(names) else names


def _are_older(names: list[str]) -> bool:
    """Whether the text model is named in the older way, and none of it in the newer one."""
    return any(name.startswith(_OLD_TEXT) for name in names) and not any(
        name.startswith(_NEW_TEXT) for name in names
    )


def _newer_name(name: str) -> str:
    if name.startswith(_OLD_TEXT):
        return _NEW_TEXT + name.removeprefix(_OLD_TEXT)
    if name.startswith(_OLD_HEAD):
        return _HEAD + name.removeprefix(_OLD_HEAD)
    return name if name.startswith((_BASE, _HEAD)) else _BASE + name


def _of_files(names: list[str]) -> list[str]:
    """12B's names in the published files, for those that its modules have in transformers."""
    if any(name.startswith(_EMBEDDER) for name in names):
        return names
    return [
        name.replace(_PROJECTION, "embed_vision.", 1)
        if name.startswith(_BASE + _PROJECTION)
        else _EMBEDDER_MODULES.sub(_EMBEDDER, name)
        for name in names
    ]


_READINGS: dict[str, Callable[[list[str]], list[str]]] = {
    "inner _orig_mod.": _without_inner,
    f"without {_BASE}": _of_whole_model,
    _OLD_TEXT: _newer,
    _PROJECTION: _of_files,
}
"""Word for the manifest → names read so, which are the same where it does not apply."""
