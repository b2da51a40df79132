"""MaxText's checkpoints as the native side of a check, run by JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_convert.forward.jax_layout import JaxLayout, Tower
from gemma_convert.forward.jax_model import JaxModel
from gemma_convert.forward.orbax_tree import LIBRARIES
from gemma_convert.forward.tree import Tree
from gemma_convert.layouts.maxtext import forward, vision
from gemma_convert.layouts.maxtext.settings import run_by
from gemma_convert.layouts.maxtext.shapes import check_shapes, text_axes
from gemma_convert.layouts.maxtext.tree import open_tree, restore_tree, tree_facts
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.facts import SOFTCAP, with_facts
from gemma_convert.prompts.images import ImageSequence


def _see(tree: Tree, architecture: Architecture, image: ImageSequence) -> Any:
    return vision.encode_image(tree, architecture, image.pixels, image.positions)


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
        "vision": Tower(_see, vision.axes, (("vision_encoder",),)),
    },
)


def open_model(items: Path, architecture: Architecture) -> JaxModel:
    """The tree in an Orbax item folder, run by the settings that lie beside it.

    MaxText 0.2.5 caps the logits of a tied head alone (`apply_output_head` in
    `layers/nnx_decoders.py`). Raises SourceError where the tree does not fit.
    """
    native, differences = run_by(items, architecture)
    softcap = architecture.text.logit_softcap
    if not native.text.tied and softcap is not None:
        native = with_facts(native, {SOFTCAP: None})
        untied = f"MaxText caps no logits of an untied head, {softcap} in config.json"
        differences = {**differences, SOFTCAP: untied}
    return JaxModel(items, native, LAYOUT, differences)
