"""MaxText's checkpoints as the native side of a check, run by JAX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma_convert.forward.adapted import NativeChanges
from gemma_convert.forward.encoder import Encoder
from gemma_convert.forward.jax_layout import JaxLayout, Tower
from gemma_convert.forward.jax_model import JaxModel
from gemma_convert.forward.orbax_tree import LIBRARIES
from gemma_convert.forward.sharding import Axes
from gemma_convert.forward.tree import Tree
from gemma_convert.layouts.maxtext import embedder, forward, vision
from gemma_convert.layouts.maxtext.shapes import check_shapes, text_axes
from gemma_convert.layouts.maxtext.tree import open_matrices, open_tree, restore_tree, tree_facts
from gemma_convert.model.architecture import Architecture
from gemma_convert.prompts.images import ImageSequence


def _see(tree: Tree, architecture: Architecture, image: ImageSequence) -> Encoder:
    see = vision.image_encoder if architecture.vision_embedder is None else embedder.image_encoder
    return see(tree, architecture, image.pixels, image.positions)


def _axes(architecture: Architecture) -> Mapping[str, Axes]:
    return vision.axes(architecture) if architecture.vision_embedder is None else embedder.axes()


LAYOUT = JaxLayout(
    name="maxtext",
    libraries=LIBRARIES,
    embedding="token_embedder/embedding",
    scaled=True,
    forward=forward,
    facts=tree_facts,
    restore=restore_tree,
    open=open_tree,
    check_shapes=check_shapes,
    axes=text_axes,
    towers={
        "vision": Tower(_see, _axes, (("vision_encoder",),)),
    },
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
