"""The JAX forward pass over the gemma library's tree equals transformers; planted mistakes show."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import FAMILIES
from gemma_jax_by_hand import flat, gemma_jax_tree, nested
from maxtext_trees import CONFIGS, change, logits_of, make_model
from safetensors.numpy import load_file

from gemma_convert.errors import SourceError
from gemma_convert.forward import decoder, decoder_layer
from gemma_convert.forward.prompt import Prompt
from gemma_convert.layouts.gemma_jax import forward as gemma_jax
from gemma_convert.layouts.gemma_jax import tree as gemma_jax_orbax
from gemma_convert.layouts.gemma_jax.forward import GemmaJaxLayer, GemmaJaxWeights
from gemma_convert.layouts.gemma_jax.shapes import TREE
from gemma_convert.logits.divergence import compare
from gemma_convert.model.config import parse_architecture, read_architecture

LENGTH = 23
LIMIT = 1e-5


def weights_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def kl(expected, found):
    """Largest KL over all tokens."""
    vocab = expected.shape[-1]
    return compare(expected.reshape(-1, vocab), np.asarray(found).reshape(-1, vocab)).kl.max()


class Case:
    """One tiny model with its ids, its reference logits and its facts."""

    def __init__(self, kind):
        model = make_model(kind)
        self.model = model
        self.architecture = parse_architecture(model.config.to_dict(), Path("config.json"))
        self.text = self.architecture.text
        self.ids = np.random.default_rng(5).integers(3, 94, (2, LENGTH)).astype(np.int32)
        self.logits = logits_of(model, self.ids)
        self.tree = nested(gemma_jax_tree(weights_of(model), self.architecture))

    def forward(self, tree=None, dtype="float32"):
        return np.asarray(gemma_jax.forward(tree or self.tree, self.text, self.ids, dtype))

    def kl(self, tree=None, dtype="float32"):
        return kl(self.logits, self.forward(tree, dtype))


@pytest.fixture(scope="module")
def case():
    return cache(Case)


@pytest.mark.share(3, 1)
@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_is_that_of_transformers(case, kind):
    one = case(kind)
    decoder_layer.layer.clear_cache()
    found = one.forward()
    assert decoder_layer.layer._cache_size() == {"dense": 2, "moe": 2, "ple": 4}[kind]
    assert found.dtype == np.float32 and found.shape == (2, LENGTH, 94)
    np.testing.assert_allclose(found, one.logits, atol=2e-3)
    assert one.kl() < 1e-7
    assert one.logits.std() > 0.5  # logits that are all alike would prove nothing


@pytest.mark.share(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_over_a_stored_tree_is_that_of_transformers(tiny, family, tmp_path):
    import orbax.checkpoint as ocp
    import torch
    from transformers import Gemma4ForConditionalGeneration

    folder = tiny(family)
    text = read_architecture(folder).text
    hf = load_file(folder / "model.safetensors")
    tree = nested(gemma_jax_tree(hf, read_architecture(folder)))
    items = tmp_path / "items"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(items, tree)
    TREE.check_shapes(gemma_jax_orbax.tree_facts(items), text, items)
    ids = np.random.default_rng(1).integers(80, text.vocab, (2, 40)).astype(np.int32)
    model = Gemma4ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    restored = gemma_jax_orbax.restore_tree(items, gemma_jax.text_modules(text))
    expected = logits_of(model, ids)
    assert kl(expected, gemma_jax.forward(restored, text, ids)) < 1e-8
    assert expected.std() > 0.5


def test_layers_that_share_keys_never_look_at_their_own(case):
    one = case("ple")
    tree = one.tree
    shared = [layer.index for layer in one.text.layers if not layer.owns_kv]
    assert shared == [4, 5, 6, 7]
    for index in shared:
        tree = change(tree, f"layer_{index}/attn/kv_einsum/w", lambda w: np.full_like(w, np.nan))
        tree = change(tree, f"layer_{index}/attn/key_norm", lambda _: {"scale": np.zeros(3)})
    np.testing.assert_array_equal(one.forward(tree), one.forward())
    # They are not even moved to the device.
    used = gemma_jax.layer_params(tree, one.text, 4)["attn"]
    assert used.keys() == {"q_einsum", "query_norm", "attn_vec_einsum"}
    assert gemma_jax.layer_params(tree, one.text, 3) is tree["layer_3"]


@pytest.mark.share(2)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_bfloat16_is_as_near_as_that_of_transformers(case, kind):
    import torch

    one = case(kind)

    def mean_kl(logits):
        return compare(one.logits.reshape(-1, 94), logits.reshape(-1, 94)).kl.mean()

    found = one.forward(dtype="bfloat16")
    theirs = logits_of(make_model(kind).to(torch.bfloat16), one.ids)
    assert found.dtype == np.float32
    assert gemma_jax.output_table(one.tree, one.text, "bfloat16").dtype == ml_dtypes.bfloat16
    assert 1e-5 < mean_kl(found) < 2 * mean_kl(theirs)


@pytest.mark.large
def test_the_tree_may_be_stored_in_bfloat16(case):
    one = case("ple")
    rounded = {path: array.astype(ml_dtypes.bfloat16) for path, array in flat(one.tree).items()}
    exact = {path: array.astype(np.float32) for path, array in rounded.items()}
    np.testing.assert_allclose(one.forward(nested(rounded)), one.forward(nested(exact)), atol=2e-3)


def test_router_weights_are_those_of_transformers(case):
    # By themselves: a norm behind the experts hides their common factor in the logits.
    import torch

    one = case("moe")
    hidden = np.random.default_rng(1).normal(size=(9, 44)).astype(np.float32)
    with torch.no_grad():
        _, weights, chosen = one.model.model.layers[1].router(torch.tensor(hidden))
    expected = np.zeros((9, 5), np.float32)
    np.put_along_axis(expected, chosen.numpy(), weights.numpy(), axis=1)
    layer = GemmaJaxLayer(one.tree["layer_1"])
    found = decoder_layer.router(
        layer, hidden[None], decoder_layer.kind_of(one.text, one.text.layers[1], type(layer))
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_per_layer_inputs_are_those_of_transformers(case):
    # By themselves as well: each layer's last norm hides their common factor.
    import torch

    one = case("ple")
    model = one.model.model
    with torch.no_grad():
        ids = torch.tensor(one.ids, dtype=torch.long)
        embedded = model.embed_tokens(ids)
        expected = model.project_per_layer_inputs(embedded, model.get_per_layer_inputs(ids))
    weights, prompt = GemmaJaxWeights(one.tree, one.text), Prompt(one.ids)
    found = decoder.embed(weights, one.text, prompt, "float32")
    np.testing.assert_allclose(found, embedded.numpy(), rtol=1e-6)
    found = decoder.per_layer_inputs(weights, one.text, prompt, found)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


L1, L2 = "layer_1", "layer_2"


def swap(first, second):
    """Swaps two arrays or subtrees of a tree."""

    def swapped(tree):
        def at(path):
            below = tree
            for name in path.split("/"):
                below = below[name]
            return below

        one, other = at(first), at(second)
        return change(change(tree, first, lambda _: other), second, lambda _: one)

    return swapped


def alter(path, function):
    return lambda tree: change(tree, path, function)


def heads_as_head_dim(kernel):
    heads, embed, head_dim = kernel.shape
    mixed = kernel.transpose(1, 0, 2).reshape(embed, head_dim, heads)
    return mixed.transpose(2, 0, 1)


def flip(kernel):
    return kernel[::-1]


MISTAKES = {
    "heads and head_dim swapped": ("dense", alter(f"{L1}/attn/q_einsum/w", heads_as_head_dim)),
    "two heads swapped": ("dense", alter(f"{L1}/attn/q_einsum/w", lambda w: w[[1, 0, 2, 3]])),
    "head order of the output": ("dense", alter(f"{L1}/attn/attn_vec_einsum/w", flip)),
    "keys and values swapped": ("dense", alter(f"{L1}/attn/kv_einsum/w", flip)),
    "kv heads swapped": ("dense", alter(f"{L1}/attn/kv_einsum/w", lambda w: w[:, ::-1])),
    "a key of another layer used as value": (
        "dense",
        alter(f"{L2}/attn/k_einsum/w", lambda w: np.roll(w, 1, axis=-1)),
    ),
    "gate and up swapped": ("dense", alter(f"{L1}/mlp/gating_einsum/w", flip)),
    "two layers swapped": ("dense", swap("layer_0", "layer_1")),
    "a layer's scalar lost": ("dense", alter(f"{L2}/skip_scale", np.ones_like)),
    "a norm's weight lost": ("dense", alter(f"{L2}/post_ffw_norm/scale", np.ones_like)),
    "a norm's weight with one added": (
        "dense",
        alter(f"{L2}/pre_ffw_norm/scale", lambda scale: scale + 1),
    ),
    "the key's norm lost": ("dense", alter(f"{L1}/attn/key_norm/scale", np.ones_like)),
    "norms of queries and keys swapped": (
        "dense",
        swap(f"{L1}/attn/query_norm", f"{L1}/attn/key_norm"),
    ),
    "embedding scaled twice": (
        "dense",
        alter("embedder/input_embedding", lambda table: table * np.float32(40**0.5)),
    ),
    "router's scale lost": ("moe", alter(f"{L1}/mlp/router_scale", np.ones_like)),
    "experts' scale lost": ("moe", alter(f"{L1}/mlp/per_expert_scale", np.ones_like)),
    "experts' gate and up swapped": (
        "moe",
        alter(f"{L1}/mlp/gating_einsum/w", lambda w: w[:, ::-1]),
    ),
    "experts shifted by one": (
        "moe",
        alter(f"{L1}/mlp/linear/w", lambda w: np.roll(w, 1, axis=0)),
    ),
    "gate and up of the dense branch swapped": ("moe", alter(f"{L1}/mlp2/gating_einsum/w", flip)),
    "norms before dense and experts swapped": (
        "moe",
        swap(f"{L1}/pre_ffw_norm", f"{L1}/pre_ffw2_norm"),
    ),
    "norms behind dense and experts swapped": (
        "moe",
        swap(f"{L1}/post_ffw1_norm", f"{L1}/post_ffw2_norm"),
    ),
    "norms behind experts and both swapped": (
        "moe",
        swap(f"{L1}/post_ffw1_norm", f"{L1}/post_ffw_norm"),
    ),
    "per-layer embeddings shifted by a layer": (
        "ple",
        alter("embedder/per_layer_embeddings", lambda table: np.roll(table, 1, axis=1)),
    ),
    "per-layer projections shifted by a layer": (
        "ple",
        alter("embedder/per_layer_model_projection/w", lambda w: np.roll(w, 1, axis=1)),
    ),
    "per-layer projection's norm lost": (
        "ple",
        alter("embedder/per_layer_projection_norm/scale", np.ones_like),
    ),
    "a layer's per-layer norm lost": (
        "ple",
        alter(f"{L1}/post_per_layer_input_norm/scale", np.ones_like),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_conversion_mistake_shows(case, name):
    kind, mistake = MISTAKES[name]
    assert case(kind).kl(mistake(case(kind).tree)) > 10 * LIMIT


# The tree on disk


def small(kernel):
    """A tree with all that is special about the library's."""
    return {
        "embedder": {"input_embedding": np.arange(6.0, dtype=np.float32).reshape(3, 2)},
        "final_norm": {"scale": np.ones(2, ml_dtypes.bfloat16)},
        "layer_0": {
            "mlp": {"gating_einsum": kernel(np.ones((2, 3, 2))), "linear": kernel(np.ones((3, 2)))},
            "mlp2": {
                "gating_einsum": kernel(np.zeros((2, 1, 2))),
                "linear": {"w": np.ones((1, 2))},
            },
            "attn": {"linear": np.full(4, 7.0)},
        },
        "audio_encoder": {"conformer/stacked_layers_0": {"final_ln": {"scale": np.full(2, 5.0)}}},
    }


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("way", ["standard", "pytree", "no ocdbt", "zarr3"])
def test_restore_reads_what_orbax_writes(tmp_path, way, bare):
    import orbax.checkpoint as ocp

    items = tmp_path / "items"
    tree = small(lambda array: array if bare else {"w": array})
    checkpointer = {
        "standard": ocp.StandardCheckpointer,
        "pytree": ocp.PyTreeCheckpointer,
        "no ocdbt": lambda: ocp.PyTreeCheckpointer(use_ocdbt=False),
        "zarr3": lambda: ocp.PyTreeCheckpointer(use_zarr3=True),
    }[way]
    with checkpointer() as writer:
        writer.save(items, tree)
    expected = flat(small(lambda array: {"w": array}))
    found = flat(gemma_jax_orbax.restore_tree(items))
    facts = gemma_jax_orbax.tree_facts(items)
    assert found.keys() == facts.keys() == expected.keys()
    assert "audio_encoder/'conformer/stacked_layers_0'/final_ln/scale" in facts
    assert {"layer_0/mlp/linear/w", "layer_0/mlp2/gating_einsum/w"} < facts.keys()
    for path, array in expected.items():
        assert type(found[path]) is np.ndarray
        np.testing.assert_array_equal(found[path], array)
        assert found[path].dtype == array.dtype
        assert (facts[path].shape, facts[path].dtype) == (array.shape, array.dtype.name)
    part = gemma_jax_orbax.restore_tree(items, ["layer_0", "final_norm"])
    assert set(part) == {"layer_0", "final_norm"}
    assert "layer_0/mlp/linear/w" in flat(part)


def test_restore_reads_the_wanted_modules_alone(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    items = tmp_path / "items"
    with ocp.StandardCheckpointer() as writer:
        writer.save(items, small(lambda array: array))
    seen = []
    original = ocp.type_handlers.NumpyHandler.deserialize

    async def spy(self, infos, args=None):
        seen.extend(info.name for info in infos)
        return await original(self, infos, args)

    monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "deserialize", spy)
    gemma_jax_orbax.restore_tree(items, ["embedder", "final_norm"])
    assert sorted(seen) == ["embedder.input_embedding", "final_norm.scale"]


def test_other_trees_are_refused(tmp_path):
    import orbax.checkpoint as ocp

    tree = small(lambda array: array)
    others = {
        "flat": ({"transformer/layer_0/attn": {"w": np.ones(2)}}, "has another layout"),
        "other": ({"embedder": {"table": np.ones(2)}}, "expected: embedder/input_embedding"),
    }
    for name, (other, message) in others.items():
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(tmp_path / name, other)
        for read in (gemma_jax_orbax.tree_facts, gemma_jax_orbax.restore_tree):
            with pytest.raises(SourceError, match=message):
                read(tmp_path / name)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "items", tree)
    with pytest.raises(SourceError, match="layer_1 in a tree"):
        gemma_jax_orbax.restore_tree(tmp_path / "items", ["embedder", "layer_1"])
    with pytest.raises(SourceError, match="no Orbax checkpoint"):
        gemma_jax_orbax.tree_facts(tmp_path)


def test_text_modules_leave_the_towers_out(case):
    one = case("dense")
    assert set(gemma_jax.text_modules(one.text)) == set(one.tree)


@pytest.mark.parametrize("kind", CONFIGS)
def test_shapes_that_do_not_fit_are_named(case, kind, tmp_path):
    import orbax.checkpoint as ocp

    one = case(kind)
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "items", one.tree)
    facts = gemma_jax_orbax.tree_facts(tmp_path / "items")
    text = one.text
    TREE.check_shapes(facts, text, tmp_path)
    for path in facts:
        with pytest.raises(SourceError, match=f"{path} is missing"):
            TREE.check_shapes({p: fact for p, fact in facts.items() if p != path}, text, tmp_path)
    first = text.layers[0]
    wrong = [
        (replace(text, vocab=95), r"embedding is \[94, \d+\] instead of \[95, \d+\]"),
        (replace(text, layers=text.layers[:-1]), f"layer_{len(text.layers) - 1} is one layer too"),
        (
            replace(text, layers=(replace(first, heads=5), *text.layers[1:])),
            "layer_0/attn/q_einsum",
        ),
        (replace(text, layers=(replace(first, mlp=8), *text.layers[1:])), "gating_einsum"),
    ]
    if kind == "moe":
        wrong.append((replace(text, experts=6), "layer_0/mlp/router_logits/w"))
    for other, message in wrong:
        with pytest.raises(SourceError, match=message):
            TREE.check_shapes(facts, other, tmp_path)


# The library's own trees


@pytest.mark.share(2)
@pytest.mark.parametrize("family", FAMILIES[::-1])  # those that are not run over a stored tree
def test_the_librarys_own_trees_give_its_own_logits(oracle, family):
    items = oracle / "gemma_jax" / family
    text = read_architecture(oracle / "hf" / family).text
    TREE.check_shapes(gemma_jax_orbax.tree_facts(items), text, items)
    tree = gemma_jax_orbax.restore_tree(items, gemma_jax.text_modules(text))
    saved = load_file(oracle / "logits" / f"gemma_jax_{family}.safetensors")
    theirs = load_file(oracle / "logits" / f"transformers_{family}.safetensors")
    np.testing.assert_array_equal(saved["input_ids"], theirs["input_ids"])
    found = np.asarray(gemma_jax.forward(tree, text, saved["input_ids"].astype(np.int32)))
    np.testing.assert_allclose(found, saved["logits"], atol=5e-3 if text.ple else 1e-4, rtol=0)
    assert kl(saved["logits"], found) < 1e-7
    assert kl(theirs["logits"], found) < 1e-7


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tree_by_hand_is_the_librarys(oracle, family):
    hf = load_file(oracle / "hf" / family / "model.safetensors")
    mine = gemma_jax_tree(hf, read_architecture(oracle / "hf" / family))
    theirs = flat(gemma_jax_orbax.restore_tree(oracle / "gemma_jax" / family))
    assert mine.keys() == theirs.keys()
    for path, array in mine.items():
        assert array.shape == theirs[path].shape, path
        np.testing.assert_array_equal(array, theirs[path], strict=False, err_msg=path)
