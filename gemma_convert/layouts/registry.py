"""The native layouts, and which of them a folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gemma_convert.checkpoint.layout import Layout
from gemma_convert.checkpoint.native import NativeSource, fingerprint
from gemma_convert.errors import SourceError
from gemma_convert.layouts.fast_llm.layout import FastLLM, fast_llm_source, is_fast_llm
from gemma_convert.layouts.gemma_jax.layout import GemmaJax, gemma_jax_source
from gemma_convert.layouts.maxtext.layout import MaxText, maxtext_source
from gemma_convert.model.huggingface_files import INDEX, SINGLE
from gemma_convert.stores.orbax.reader import find_items, read_orbax_tree

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout for layout in (MaxText(), GemmaJax(), FastLLM())
}


def open_native(path: Path, block_bytes: int | None = None) -> NativeSource:
    """The native checkpoint at `path`, whatever its layout, to be read in blocks of that size.

    Raises SourceError where there is none, or none of a known layout.
    """
    if is_fast_llm(path):
        found = fingerprint(path)
        return replace(fast_llm_source(path), block_bytes=block_bytes, fingerprint=found)
    items = find_items(path)
    found = fingerprint(items)
    tree = read_orbax_tree(items)
    native = maxtext_source(tree) or gemma_jax_source(tree)
    if native is not None:
        return replace(native, block_bytes=block_bytes, fingerprint=found)
    raise SourceError(
        "The checkpoint holds no parameters in a layout that is known.",
        where=tree.folder,
        expected="MaxText's tree, the gemma library's tree, or Fast-LLM's files",
        found=", ".join(sorted({name.split("/")[0] for name in tree.arrays})[:8]) or "no arrays",
    )


def is_native(path: Path) -> bool:
    """Whether a folder holds a native checkpoint rather than Hugging Face files."""
    if any((path / name).exists() for name in (SINGLE, INDEX)):
        return False
    if is_fast_llm(path):
        return True
    try:
        find_items(path)
    except SourceError:
        return False
    return True
