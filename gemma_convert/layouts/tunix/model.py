"""Tunix' checkpoints as the native side of a check, run by JAX."""

from __future__ import annotations

from pathlib import Path

from gemma_convert.forward.adapted import NativeChanges
from gemma_convert.forward.jax_layout import JaxLayout
from gemma_convert.forward.jax_model import JaxModel
from gemma_convert.forward.orbax_tree import LIBRARIES
from gemma_convert.layouts.tunix import forward
from gemma_convert.layouts.tunix.names import EMBEDDING
from gemma_convert.layouts.tunix.shapes import TREE
from gemma_convert.layouts.tunix.tree import open_matrices, open_tree, restore_tree, tree_facts
from gemma_convert.model.architecture import Architecture

LAYOUT = JaxLayout(
    name="tunix",
    libraries=LIBRARIES,
    embedding=EMBEDDING,
    scaled=False,
    forward=forward,
    facts=tree_facts,
    restore=restore_tree,
    open=open_tree,
    check_shapes=TREE.check_shapes,
    axes=TREE.text_axes,
    towers={},
)


def open_model(items: Path, architecture: Architecture) -> JaxModel:
    """The tree in an Orbax item folder. Raises SourceError where it does not fit."""
    return JaxModel(items, architecture, LAYOUT)


def open_adapted(
    items: Path, architecture: Architecture, adapter: Path, scaling: float
) -> JaxModel:
    """The same tree with the adapter in another item folder; raises SourceError as well."""
    changes = NativeChanges(adapter, open_matrices(adapter), scaling)
    return JaxModel(items, architecture, LAYOUT, changes)
