"""The gemma library's checkpoints as the native side of a check, run by JAX."""

from __future__ import annotations

from pathlib import Path

from gemma_convert.forward.encoder import Encoder
from gemma_convert.forward.jax_layout import JaxLayout, Tower
from gemma_convert.forward.jax_model import JaxModel
from gemma_convert.forward.orbax_tree import LIBRARIES
from gemma_convert.forward.tree import Tree
from gemma_convert.layouts.gemma_jax import audio, forward, vision
from gemma_convert.layouts.gemma_jax.shapes import TREE
from gemma_convert.layouts.gemma_jax.tree import open_tree, restore_tree, tree_facts
from gemma_convert.model.architecture import Architecture
from gemma_convert.prompts.images import ImageSequence
from gemma_convert.prompts.sounds import SoundSequence


def _see(tree: Tree, architecture: Architecture, image: ImageSequence) -> Encoder:
    return vision.image_encoder(tree, architecture, image.pixels, image.positions)


def _hear(tree: Tree, architecture: Architecture, sound: SoundSequence) -> Encoder:
    return audio.sound_encoder(tree, architecture, sound.features)


LAYOUT = JaxLayout(
    name="gemma-jax",
    libraries=LIBRARIES,
    embedding="embedder/input_embedding",
    scaled=False,
    forward=forward,
    facts=tree_facts,
    restore=restore_tree,
    open=open_tree,
    check_shapes=TREE.check_shapes,
    axes=TREE.text_axes,
    towers={
        "vision": Tower(
            _see, vision.axes, (("vision_encoder",), ("embedder", "mm_input_projection"))
        ),
        "audio": Tower(
            _hear, audio.axes, (("audio_encoder",), ("embedder", "audio_input_projection"))
        ),
    },
)


def open_model(items: Path, architecture: Architecture) -> JaxModel:
    """The tree in an Orbax item folder. Raises SourceError where it does not fit."""
    return JaxModel(items, architecture, LAYOUT)
