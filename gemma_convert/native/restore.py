"""A MaxText checkpoint → its parameter tree, read by Orbax itself.

Our own store is never used here: a check that read the tree with the code that wrote it would hide
that code's mistakes. Nothing is written, and no optimizer state is loaded. Layout of the folders:
MaxText's `load_parameters_path` and its training checkpoints (August 2026).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gemma_convert.errors import SourceError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Tree: TypeAlias = dict[str, Any]
"""Nested dicts whose leaves are arrays; bfloat16 is ml_dtypes' bfloat16."""

TEXT_MODULES = ("token_embedder", "decoder")

_CONTENT = "_METADATA"


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

    `modules` names the modules to read (`TEXT_MODULES` leaves the vision tower out); None reads
    all. Raises SourceError where the tree is not `params.params.<module>` or lacks a module.
    """
    import orbax.checkpoint as ocp

    with _orbax(items) as handler:
        below = _below_params(_metadata(handler, items), items)
        for module in modules or ():
            if module not in below:
                raise _unlike_maxtext(items, f"params.params.{module}", below)
        wanted = {name: below[name] for name in (modules or below)}
        item = {"params": {"params": wanted}}
        arguments = ocp.args.PyTreeRestore(
            item=item,
            restore_args=_as_numpy(item, ocp.RestoreArgs(restore_type=np.ndarray)),
            **_only_these_leaves(ocp),
        )
        try:
            restored = handler.restore(items, args=arguments)
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(
                "Orbax cannot read this checkpoint.", where=items, found=str(error)[:500]
            ) from error
    return _numpy(restored["params"]["params"])


@contextmanager
def _orbax(items: Path) -> Iterator[ocp.PyTreeCheckpointHandler]:
    """Orbax's reader of one tree; its log lines about every single leaf are held back."""
    import orbax.checkpoint as ocp

    if not (items / _CONTENT).is_file():
        raise SourceError("There is no Orbax tree here.", where=items, expected=_CONTENT)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        yield handler
    finally:
        handler.close()
        logger.setLevel(level)


def _metadata(handler: ocp.PyTreeCheckpointHandler, items: Path) -> Any:
    try:
        metadata = handler.metadata(items)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            "Orbax cannot read this checkpoint's metadata.", where=items, found=str(error)[:500]
        ) from error
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
    names = ", ".join(sorted(map(str, level))[:8]) if isinstance(level, Mapping) else "no dict"
    return SourceError(
        "This is not MaxText's parameter tree.",
        where=items,
        expected=f"{missing} in a tree params.params.<module>",
        found=names or "nothing",
    )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, ArrayFacts]]:
    if isinstance(tree, Mapping):
        for name, below in tree.items():
            yield from _leaves(below, f"{path}/{name}" if path else str(name))
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
