"""The model that an adapter belongs to: named by the user, by the adapter, or kept in a sidecar."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.files.confined import NEVER_READ, check_confined
from gemma_convert.model.adapter import check_matrices, is_adapter, named_base, read_adapter
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import read_architecture

KEPT_BASE = "base"
"""The folder of a sidecar that keeps config.json of an adapter's base model."""

_WHOLE_TEXT = "model.language_model."


def architecture_of(folder: Path, names: Iterable[str], base: Path | None) -> Architecture:
    """The model in `folder`, or the adapter whose tensors have these `names` and its `base` model.

    Without `base` an adapter belongs to the folder that its adapter_config.json names. Raises
    SourceError where that is none, or where the adapter is not one that is converted.
    """
    if base is None and not is_adapter(folder):
        return read_architecture(folder)
    adapter, names = read_adapter(folder), list(names)
    check_matrices(adapter, names, folder)
    model = read_architecture(base or named_folder(folder))
    text_only = not any(name.startswith(_WHOLE_TEXT) for name in names)
    return replace(model, adapter=adapter, text_only=text_only)


def named_folder(folder: Path) -> Path:
    """The folder that the adapter in `folder` names as its base model.

    Nothing is fetched on an adapter's word. Raises SourceError where it names none that is here.
    """
    named = named_base(folder)
    if named is None or not Path(named).is_dir():
        raise SourceError(
            "The base model of this adapter was not found, so its layers are unknown.",
            where=folder,
            found=named,
            do="name its folder, or owner/name on the hub, with --base; config.json is enough",
        )
    check_confined(Path(named), passed_over=NEVER_READ)
    return Path(named)
