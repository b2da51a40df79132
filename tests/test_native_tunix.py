"""The forward pass over Tunix' tree: its own recorded logits, and what does not fit is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import FAMILIES
from gemma_jax_by_hand import nested
from trees import read_safetensors
from tunix_by_hand import tunix_tree

from gemma_convert import SourceError
from gemma_convert.forward.arithmetic import rms_norm
from gemma_convert.forward.decoder_layer import kind_of
from gemma_convert.layouts.tunix import forward as tunix
from gemma_convert.layouts.tunix.forward import TunixLayer, TunixWeights
from gemma_convert.layouts.tunix.shapes import TREE
from gemma_convert.layouts.tunix.tree import open_tree, restore_tree, tree_facts
from gemma_convert.model.config import read_architecture

RECORDED = Path(__file__).parent / "data" / "tunix"
EVERY = 5
"""Of which part of the vocabulary logits are recorded."""


def items_of(native: Path) -> Path:
    return native / "0" / "model_params"


def tree_of(source: Path, dtype: str = "float32") -> dict:
    """The nested tree of a Hugging Face checkpoint, made by numpy."""
    flat = tunix_tree(read_safetensors(source), read_architecture(source))
    return nested({name.removesuffix("/value"): flat[name].astype(dtype) for name in flat})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterOf017(TunixLayer):
    """A layer of google-tunix 0.1.7, whose router is given what the experts are given.

    Mended in its repository after that release; transformers gives it the state before the norm.
    """

    def router_scores(self, hidden):
        factor = self.router_scale().astype(np.float32) * np.float32(hidden.shape[-1] ** -0.5)
        twice = rms_norm(hidden / factor, self.scale("pre_experts"), 1e-6)
        return super().router_scores(rms_norm(twice, None, 1e-6) * factor)


class WeightsOf017(TunixWeights):
    def layer(self, index):
        return RouterOf017(tunix.layer_params(self.tree, self.text, index))


@pytest.mark.parametrize("family", (*FAMILIES, "12b"))
def test_tunix_own_logits(shallow, converted, monkeypatch, family):
    """To 1e-4; the largest difference seen is 1.5e-5."""
    source = shallow(family)
    text = read_architecture(source).text
    items = items_of(converted(source, "tunix"))
    TREE.check_shapes(tree_facts(items), text, items)
    recorded = np.load(RECORDED / f"{family}.npz")
    tree = restore_tree(items, tunix.text_modules(text))
    if text.moe:
        found = tunix.forward(tree, text, recorded["ids"])
        assert np.abs(found[..., ::EVERY] - recorded["logits"]).max() > 0.1
        monkeypatch.setattr(tunix, "weights", WeightsOf017)
    found = np.asarray(tunix.forward(tree, text, recorded["ids"]))[..., ::EVERY]
    np.testing.assert_allclose(found, recorded["logits"], atol=1e-4, rtol=0)
    assert recorded["logits"].std() > 1  # logits that are all alike would prove nothing


def test_layers_of_two_classes_are_compiled_apart(shallow):
    """JAX holds their pytrees for equal, and would find one's compiled layer for the other's."""
    text = read_architecture(shallow("26b-a4b")).text
    ours, theirs = (
        (jax.tree.structure(made({"a": 0})), kind_of(text, text.layers[0], made))
        for made in (TunixLayer, RouterOf017)
    )
    assert ours != theirs


def test_layers_that_share_keys_never_look_at_their_own(shallow):
    source = shallow("e2b")
    text, tree = read_architecture(source).text, tree_of(source)
    shared = [layer.index for layer in text.layers if not layer.owns_kv]
    assert shared == [5, 6, 7, 8, 9]
    for index in shared:
        used = tunix.layer_params(tree, text, index)["attn"]
        assert used.keys() == {"q_einsum", "_query_norm", "attn_vec_einsum"}
    assert tunix.layer_params(tree, text, 4) is tree["layers"]["4"]


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_shapes_that_do_not_fit_are_named(shallow, converted, tmp_path, family):
    text = read_architecture(shallow(family)).text
    facts = tree_facts(items_of(converted(shallow(family), "tunix")))
    TREE.check_shapes(facts, text, tmp_path)
    assert TREE.text_axes(text).keys() == facts.keys()
    for path in facts:
        with pytest.raises(SourceError, match=f"{path} is missing"):
            TREE.check_shapes({p: facts[p] for p in facts if p != path}, text, tmp_path)
    first = text.layers[0]
    for other, message in (
        (replace(text, vocab=95), r"embedder/input_embedding is \[\d+, \d+\] instead of \[95"),
        (replace(text, layers=text.layers[:-1]), "is one layer too many"),
        (replace(text, layers=(replace(first, heads=5), *text.layers[1:])), "layers/0/attn/q_ein"),
        (replace(text, layers=(replace(first, mlp=8), *text.layers[1:])), "mlp/down_proj/kernel"),
    ):
        with pytest.raises(SourceError, match=message):
            TREE.check_shapes(facts, other, tmp_path)


def test_a_tree_is_left_in_its_file_or_read(shallow, converted):
    items = items_of(converted(shallow("31b"), "tunix"))
    left, read = open_tree(items, ["final_norm"]), restore_tree(items, ["final_norm"])
    assert left.keys() == read.keys() == {"final_norm"}
    scale = read["final_norm"]["scale"]
    np.testing.assert_array_equal(np.asarray(left["final_norm"]["scale"][0 : len(scale)]), scale)
    with pytest.raises(SourceError, match=r"Tunix' parameter tree(.|\n)*vision_encoder"):
        restore_tree(items, ["vision_encoder"])
