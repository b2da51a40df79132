"""What stands in a folder beside a checkpoint: nobody's checkpoint is replaced with it.

A folder may be replaced where every name in it is one that a checkpoint has: those that the
framework writes, those of the sidecar, and those that its manifest lists.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.adapter_base import KEPT_BASE
from gemma_convert.checkpoint.manifest import MANIFEST, read_manifest
from gemma_convert.errors import GemmaConvertError, SourceError, TargetError, some
from gemma_convert.files.json_file import read_object
from gemma_convert.mapping.declared import layout_names
from gemma_convert.mapping.rows import Files
from gemma_convert.mapping.table import load_table
from gemma_convert.model.adapter import is_adapter
from gemma_convert.model.huggingface_files import INDEX, SINGLE

Strangers = Callable[[Path], list[str]]
"""A folder → what stands in it beside a checkpoint. Raises TargetError where it holds none."""

_MAX_METADATA_BYTES = 256 << 20
_ORBAX = (
    r"_METADATA|_CHECKPOINT_METADATA|_sharding|_strings\.json|commit_success\.txt",
    r"array_metadatas(/process_\d+)?|descriptor(/descriptor\.pbtxt)?",
    r"manifest\.ocdbt|d(/[0-9a-f]{32})?",
    r"ocdbt\.process_\d+(/manifest\.ocdbt|/d(/[0-9a-f]{32})?)?",
)
_IN_ARRAY = r"/\.zarray|/\.zattrs|/zarr\.json|/\d+(\.\d+)*|/c(/\d+)*"
_STEP = r"0|0/items|0/_CHECKPOINT_METADATA|0/commit_success\.txt"
_OWN = "|".join(
    (
        rf"{sidecar.FOLDER}(/{sidecar.OWN}(/{sidecar.HEADERS}(/[^/]+\.header)?)?)?",
        *(
            rf"{sidecar.FOLDER}/{sidecar.OWN}/{re.escape(name)}"
            for name in (MANIFEST, sidecar.CARRIED, sidecar.EXCEPTIONS)
        ),
        rf"{sidecar.FOLDER}/{sidecar.OWN}/{KEPT_BASE}(/config\.json)?",
    )
)
_HUGGING_FACE = (
    r"(model(-\d{5}-of-\d{5})?|adapter_model)\.safetensors|adapter_config\.json",
    re.escape(INDEX),
    r"(config|generation_config|processor_config|preprocessor_config)\.json",
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template)\.json",
    r"tokenizer\.model|chat_template\.jinja",
)


def beside_native(folder: Path) -> list[str]:
    """What stands in `folder` beside one native checkpoint and its sidecar."""
    items = next((at for at in ("", "0/items/") if (folder / at / "_METADATA").is_file()), None)
    if items is not None:
        patterns = [_STEP, *(f"{items}({pattern})" for pattern in _orbax(folder / items))]
        beside = (files.allowed for files in _declared_files() if not files.needed)
        patterns += [name for names in beside for name in names]
    elif not (patterns := _layout_files(folder)):
        raise _no_checkpoint(folder, "native checkpoint")
    return _others(folder, [*patterns, _OWN], _listed(folder))


def beside_huggingface(folder: Path, writes: Iterable[str] = ()) -> list[str]:
    """What stands in `folder` beside a Hugging Face checkpoint, and files that we would write."""
    model = (folder / "config.json").is_file() and any(
        (folder / name).is_file() for name in (SINGLE, INDEX)
    )
    if not model and not is_adapter(folder):
        raise _no_checkpoint(folder, "Hugging Face checkpoint")
    return _others(folder, _HUGGING_FACE, _with_folders(writes))


def _no_checkpoint(folder: Path, wanted: str) -> TargetError:
    names = sorted(f"{e.name}/" if e.is_dir() else e.name for e in folder.iterdir())
    return TargetError(
        f"The target is not a {wanted}, so --overwrite does not replace it.",
        where=folder,
        found=some(names),
        do="choose another target, or remove it yourself",
    )


def _orbax(items: Path) -> Iterator[str]:
    """Patterns of what an Orbax item folder holds: its own files, and the arrays of its tree."""
    yield from _ORBAX
    try:
        tree = read_object(items / "_METADATA", "Orbax' metadata", _MAX_METADATA_BYTES)
        entries = list(tree["tree_metadata"].values())
        names = {".".join(str(k["key"]) for k in one["key_metadata"]) for one in entries}
    except (SourceError, FileNotFoundError, LookupError, TypeError, AttributeError):
        return
    if names:
        yield f"({'|'.join(map(re.escape, names))})({_IN_ARRAY})?"


def _layout_files(folder: Path) -> list[str]:
    """Patterns of the files of the layout whose checkpoint stands in `folder`, none without one."""
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    for files in _declared_files():
        if files.needed and all(
            any(re.fullmatch(pattern, name) for name in names) for pattern in files.needed
        ):
            return [*files.needed, *files.allowed]
    return []


def _declared_files() -> Iterator[Files]:
    """The files that the tables of layouts declare; those on Orbax need none of their own."""
    for layout in layout_names():
        try:
            files = load_table(layout).files
        except GemmaConvertError:  # one that cannot be used has written nothing here
            continue
        if files is not None:
            yield files


def _listed(folder: Path) -> set[str]:
    """The other files that the manifest of a sidecar lists."""
    try:
        manifest = read_manifest(folder, damaged=True) or {}
    except SourceError:
        return set()
    return _with_folders(f"{sidecar.FOLDER}/{name}" for name in manifest.get("files_sha256", {}))


def _with_folders(files: Iterable[str]) -> set[str]:
    found = set(files)
    return found | {str(folder) for name in found for folder in Path(name).parents}


def _others(folder: Path, patterns: Iterable[str], known: set[str]) -> list[str]:
    """Relative names below `folder`, folders with a slash behind them, that are none of these.

    Links and whatever else is no file belong to no checkpoint that was written here.
    """
    whole = [re.compile(pattern) for pattern in patterns]
    found: list[str] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        for entry in sorted(os.scandir(folder / below), key=lambda entry: entry.name):
            name = f"{below}{entry.name}"
            mode = entry.stat(follow_symlinks=False).st_mode
            plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
            ours = name in known or any(pattern.fullmatch(name) for pattern in whole)
            if not plain or not ours:
                found.append(f"{name}/" if stat.S_ISDIR(mode) else name)
            elif stat.S_ISDIR(mode):
                waiting.append(f"{name}/")
    return found
