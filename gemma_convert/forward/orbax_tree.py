"""An Orbax checkpoint → its tree, restored by Orbax itself or left in its file.

Our own store is never used here: a check that read the tree with the code that wrote it would hide
that code's mistakes. Nothing is written, and no more is read than is asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_convert.errors import SourceError
from gemma_convert.files.confined import check_confined
from gemma_convert.files.json_file import read_object
from gemma_convert.files.libraries import told_by_library
from gemma_convert.files.library_path import library_path
from gemma_convert.files.read_once import once
from gemma_convert.forward.stored import StoredArray, open_stored
from gemma_convert.forward.tree import Tree, named
from gemma_convert.stores.orbax.finding import METADATA
from gemma_convert.stores.orbax.reader import MAX_METADATA_BYTES
from gemma_convert.stores.orbax.wrapped import Keys, unwrapped

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

LIBRARIES = ("jax", "orbax-checkpoint")
"""What a tree of Orbax is run with, for the report."""


@dataclass(frozen=True)
class OrbaxItems:
    """A model's tree in one Orbax item folder: `tree` has what Orbax says of each leaf.

    `paths` says where each leaf of it, by its keys, stands in the tree of the folder.
    """

    folder: Path
    tree: Tree
    paths: Mapping[Keys, Keys]

    def restored(self, part: Tree) -> Tree:
        """The leaves that stand in `part`, a part of the tree, as numpy arrays."""
        import orbax.checkpoint as ocp

        wanted = dict(_leaves(part))
        item = _nested({self.paths[keys]: leaf for keys, leaf in wanted.items()})
        arguments = ocp.args.PyTreeRestore(
            item=item,
            restore_args=_as_numpy(item, ocp.RestoreArgs(restore_type=np.ndarray)),
            **_only_these_leaves(ocp),
        )
        with _reader() as orbax, told_by_library("Orbax cannot read this checkpoint.", self.folder):
            found = dict(_leaves(orbax.restore(library_path(self.folder), args=arguments)))
            return _nested({keys: np.asarray(found[self.paths[keys]]) for keys in wanted})

    def opened(self, part: Tree) -> Tree:
        """The same leaves as StoredArrays, in the format that Orbax' own file says."""
        facts = read_object(self.folder / METADATA, "Orbax' metadata", MAX_METADATA_BYTES)
        ocdbt, zarr3 = bool(facts.get("use_ocdbt")), bool(facts.get("use_zarr3"))

        def left(level: Tree) -> dict[str, Any | StoredArray]:
            return {
                key: left(below)
                if isinstance(below, Mapping)
                else open_stored(self.folder, below.name, ocdbt, zarr3)
                for key, below in level.items()
            }

        return left(part)


@contextmanager
def orbax_items(folder: Path, *roots: Keys) -> Iterator[OrbaxItems]:
    """Orbax's reader of the model in an item folder, whose paths begin with `roots`.

    Its log lines about every single leaf are held back. Raises SourceError where there is no such
    tree, or where Orbax cannot read its metadata.
    """
    if not (folder / METADATA).is_file():
        raise SourceError(
            "There is no Orbax checkpoint in this folder.", where=folder, expected=METADATA
        )
    check_confined(folder)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        whole = _metadata(folder)
        leaves = dict(_leaves(whole))
        paths = unwrapped(leaves, roots)
        if not paths:
            raise SourceError(
                "The Orbax checkpoint has another layout.",
                where=folder,
                expected=" or ".join("/".join(root) for root in roots),
                found=named(whole),
            )
        tree = _nested({name: leaves[path] for name, path in paths.items()})
        yield OrbaxItems(folder, tree, paths)
    finally:
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


@contextmanager
def _reader() -> Iterator[ocp.PyTreeCheckpointHandler]:
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    try:
        with _patient_loops():
            yield handler
    finally:
        handler.close()


@once
def _metadata(folder: Path) -> Any:
    where = folder / METADATA
    with _reader() as orbax, told_by_library("Orbax cannot read its metadata.", where):
        metadata = orbax.metadata(library_path(folder))
    return getattr(metadata, "tree", metadata)


def _only_these_leaves(ocp: Any) -> dict[str, Any]:
    """How Orbax is told to leave out what `item` does not name; old ones know the second alone."""
    if "partial_restore" in {field.name for field in fields(ocp.args.PyTreeRestore)}:
        return {"partial_restore": True}
    return {"transforms": {}}


def _as_numpy(tree: Any, argument: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _as_numpy(below, argument) for name, below in tree.items()}
    return argument


def _leaves(tree: Any, above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every leaf that stands below keys alone, by these."""
    if isinstance(tree, Mapping):
        for key, below in tree.items():
            yield from _leaves(below, (*above, str(key)))
    elif above:
        yield above, tree


def _nested(leaves: Mapping[Keys, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for keys, leaf in leaves.items():
        level = tree
        for key in keys[:-1]:
            level = level.setdefault(key, {})
        level[keys[-1]] = leaf
    return tree
