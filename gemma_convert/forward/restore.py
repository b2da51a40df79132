"""A MaxText or gemma checkpoint → its parameter tree, restored by Orbax or left in its file.

Our own store is never used here: a check that read the tree with the code that wrote it would hide
that code's mistakes. Nothing is written, and no optimizer state is loaded. Layout of the folders:
MaxText's `load_parameters_path` and its training checkpoints (August 2026); what
`gm.ckpts.save_params` of google/gemma 4.1.0 writes.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gemma_convert.errors import SourceError
from gemma_convert.files.confined import check_confined
from gemma_convert.files.json_file import read_object
from gemma_convert.files.libraries import told_by_library
from gemma_convert.files.library_path import library_path
from gemma_convert.forward.stored import StoredArray, open_stored
from gemma_convert.stores.orbax.reader import MAX_METADATA_BYTES, METADATA

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Tree: TypeAlias = dict[str, Any]
"""Nested dicts whose leaves are arrays; bfloat16 is ml_dtypes' bfloat16."""


@dataclass(frozen=True)
class ArrayFacts:
    """Shape and dtype of one stored array, known without reading it."""

    shape: tuple[int, ...]
    dtype: str


def maxtext_facts(items: Path) -> dict[str, ArrayFacts]:
    """Shapes and dtypes of the tree below params/params, by path with slashes; reads no array."""
    with _orbax(items) as handler:
        return dict(_leaves(_below_params(_metadata(handler, items), items)))


def restore_maxtext(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The nested dict below params/params, as numpy arrays of the stored dtypes.

    `modules` names the modules to read (`maxtext.text_modules` leaves the vision tower out); None
    reads all. Raises SourceError where the tree is not `params.params.<module>` or lacks a module.
    """
    with _orbax(items) as handler:
        wanted = _maxtext_modules(handler, items, modules)
        tree: Tree = _restored(handler, items, {"params": {"params": wanted}})["params"]["params"]
        return tree


def open_maxtext(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The same tree with every array left in its file, as a StoredArray."""
    with _orbax(items) as handler:
        return _stored(_maxtext_modules(handler, items, modules), items)


def is_gemma_jax(items: Path) -> bool:
    """Whether the tree is the gemma library's, by its first keys, rather than MaxText's."""
    with _orbax(items) as handler:
        tree = _metadata(handler, items)
        return isinstance(tree, Mapping) and "embedder" in tree


def gemma_jax_facts(items: Path) -> dict[str, ArrayFacts]:
    """Shapes and dtypes of the tree by path with slashes; reads no array.

    A key that holds a slash stands in single quotes; dense feed-forward kernels end in `/w`.
    """
    with _orbax(items) as handler:
        return dict(_leaves(_dense_below_w(_gemma_jax_tree(_metadata(handler, items), items))))


def restore_gemma_jax(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The nested dict that the gemma library loads, as numpy arrays of the stored dtypes.

    `modules` names the keys to read (`gemma_jax.text_modules` leaves the towers out); None reads
    all. Dense feed-forward kernels, which may be stored bare, come out as `{"w": kernel}`. Raises
    SourceError where the tree has a `params` wrapper, is not nested as the library has it or lacks
    a module.
    """
    with _orbax(items) as handler:
        wanted = _gemma_jax_modules(handler, items, modules)
        return _dense_below_w(_restored(handler, items, wanted))


def open_gemma_jax(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The same tree with every array left in its file, as a StoredArray."""
    with _orbax(items) as handler:
        return _dense_below_w(_stored(_gemma_jax_modules(handler, items, modules), items))


def _maxtext_modules(
    handler: ocp.PyTreeCheckpointHandler, items: Path, modules: Sequence[str] | None
) -> Tree:
    """What the metadata has of `modules` below params/params."""
    below = _below_params(_metadata(handler, items), items)
    for module in modules or ():
        if module not in below:
            raise _unlike_maxtext(items, f"params.params.{module}", below)
    return {name: below[name] for name in (modules or below)}


def _gemma_jax_modules(
    handler: ocp.PyTreeCheckpointHandler, items: Path, modules: Sequence[str] | None
) -> Tree:
    """What the metadata has of `modules`."""
    tree = _gemma_jax_tree(_metadata(handler, items), items)
    for module in modules or ():
        if module not in tree:
            raise _unlike_gemma_jax(items, module, tree)
    return {name: tree[name] for name in (modules or tree)}


def _stored(metadata: Mapping[str, Any], items: Path) -> Tree:
    """The arrays that `metadata` names, opened in the format that Orbax' own file says."""
    facts = read_object(items / METADATA, "Orbax' metadata", MAX_METADATA_BYTES)
    ocdbt, zarr3 = bool(facts.get("use_ocdbt")), bool(facts.get("use_zarr3"))

    def opened(level: Mapping[str, Any]) -> dict[str, Any | StoredArray]:
        return {
            key: opened(below)
            if isinstance(below, Mapping)
            else open_stored(items, below.name, ocdbt, zarr3)
            for key, below in level.items()
        }

    return opened(metadata)


def _restored(handler: ocp.PyTreeCheckpointHandler, items: Path, item: Tree) -> Tree:
    """The arrays that stand in `item`, the part of the metadata that is wanted."""
    import orbax.checkpoint as ocp

    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=_as_numpy(item, ocp.RestoreArgs(restore_type=np.ndarray)),
        **_only_these_leaves(ocp),
    )
    with _patient_loops(), told_by_library("Orbax cannot read this checkpoint.", items):
        return _numpy(handler.restore(library_path(items), args=arguments))


@contextmanager
def _orbax(items: Path) -> Iterator[ocp.PyTreeCheckpointHandler]:
    """Orbax's reader of one tree; its log lines about every single leaf are held back."""
    import orbax.checkpoint as ocp

    if not (items / METADATA).is_file():
        raise SourceError("There is no Orbax tree here.", where=items, expected=METADATA)
    check_confined(items)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        yield handler
    finally:
        handler.close()
        logger.setLevel(level)


class _PatientLoop(asyncio.SelectorEventLoop):
    """A loop that ends when all that was begun in it has ended."""

    def close(self) -> None:
        pending = [] if self.is_closed() else asyncio.all_tasks(self)
        if pending:
            self.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        super().close()


class _PatientPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


@contextmanager
def _patient_loops() -> Iterator[None]:
    """Orbax opens all arrays at once and closes its loop when one is broken; others then complain.

    Within it a loop waits for them, so that the one message is not lost among theirs.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def _metadata(handler: ocp.PyTreeCheckpointHandler, items: Path) -> Any:
    where = items / METADATA
    with _patient_loops(), told_by_library("Orbax cannot read its metadata.", where):
        metadata = handler.metadata(library_path(items))
    return getattr(metadata, "tree", metadata)


def _only_these_leaves(ocp: Any) -> dict[str, Any]:
    """How Orbax is told to leave out what `item` does not name; old ones know the second alone."""
    if "partial_restore" in {field.name for field in fields(ocp.args.PyTreeRestore)}:
        return {"partial_restore": True}
    return {"transforms": {}}


def _below_params(tree: Any, items: Path) -> Tree:
    outer = tree.get("params") if isinstance(tree, Mapping) else None
    if not isinstance(outer, Mapping):
        raise _unlike_maxtext(items, "params", tree)
    inner = outer.get("params")
    if not isinstance(inner, Mapping) or not inner:
        raise _unlike_maxtext(items, "params.params", outer)
    return dict(inner)


def _unlike_maxtext(items: Path, missing: str, level: Any) -> SourceError:
    return SourceError(
        "This is not MaxText's parameter tree.",
        where=items,
        expected=f"{missing} in a tree params.params.<module>",
        found=_names(level),
    )


def _names(level: Any) -> str:
    """Names of the keys that stand at one level of a tree, the first few of them."""
    names = ", ".join(sorted(map(str, level))[:8]) if isinstance(level, Mapping) else "no dict"
    return names or "nothing"


def _gemma_jax_tree(tree: Any, items: Path) -> Tree:
    if not isinstance(tree, Mapping) or not isinstance(tree.get("embedder"), Mapping):
        raise _unlike_gemma_jax(items, "embedder", tree)
    return dict(tree)


def _unlike_gemma_jax(items: Path, missing: str, level: Any) -> SourceError:
    wrapped = isinstance(level, Mapping) and "params" in level
    return SourceError(
        "This is not the gemma library's parameter tree.",
        where=items,
        expected=f"{missing} in a tree of nested dicts",
        found=_names(level),
        do="save what stands below params, which is what the library loads" if wrapped else None,
    )


def _dense_below_w(tree: Tree) -> Tree:
    """The tree with `{"w": kernel}` for every kernel of a dense feed-forward that stands bare."""
    return {
        name: _layer_below_w(below) if re.fullmatch(r"layer_\d+", name, re.ASCII) else below
        for name, below in tree.items()
    }


def _layer_below_w(layer: Any) -> Any:
    if not isinstance(layer, Mapping):
        return layer
    found = dict(layer)
    for branch in found.keys() & {"mlp", "mlp2"}:
        if isinstance(found[branch], Mapping):
            found[branch] = {
                name: {"w": below}
                if name in ("gating_einsum", "linear") and not isinstance(below, Mapping)
                else below
                for name, below in found[branch].items()
            }
    return found


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, ArrayFacts]]:
    if isinstance(tree, Mapping):
        for name, below in tree.items():
            key = f"'{name}'" if "/" in name else name
            yield from _leaves(below, f"{path}/{key}" if path else key)
    elif getattr(tree, "shape", None) is not None:
        yield path, ArrayFacts(tuple(tree.shape), np.dtype(tree.dtype).name)


def _as_numpy(tree: Any, argument: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _as_numpy(below, argument) for name, below in tree.items()}
    return argument


def _numpy(tree: Mapping[str, Any]) -> Tree:
    return {
        name: _numpy(below) if isinstance(below, Mapping) else np.asarray(below)
        for name, below in tree.items()
    }
