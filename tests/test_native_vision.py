"""Vision encoders over native trees give transformers' image features, whatever the image's shape.

transformers' own float32 noise here is about 1e-6 of the largest feature.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cases import FAMILIES
from gemma_jax_by_hand import gemma_jax_tree

from gemma_convert.errors import SourceError
from gemma_convert.forward.encoder import encoded
from gemma_convert.forward.vision import pool, rotary
from gemma_convert.layouts.gemma_jax import tree as gemma_jax_orbax
from gemma_convert.layouts.gemma_jax import vision as gemma_jax_vision
from gemma_convert.layouts.maxtext import tree as maxtext_orbax
from gemma_convert.layouts.maxtext import vision as maxtext_vision
from gemma_convert.mapping.notation import split_path
from gemma_convert.model.config import parse_architecture, read_architecture

LIMIT = 2e-5
WITH_MAXTEXT = ("26b-a4b", "31b")
SHAPES = {
    "square": (40, 40),
    "wide": (31, 95),
    "tall": (95, 31),
    "one row of tokens": (12, 130),
}


def nested(flat):
    """The nested dict of a flat one, path → array."""
    tree = {}
    for path, array in flat.items():
        *keys, last = split_path(path)
        below = tree
        for key in keys:
            below = below.setdefault(key, {})
        below[last] = array
    return tree


def maxtext_vision_tree(hf, vision):
    """Path below params/params → array of MaxText's vision encoder, by plain numpy."""
    encoder, tower = "vision_encoder/Gemma4VisionEncoderLayer_0/", "model.vision_tower."
    embedder = tower + "patch_embedder."
    table = hf[embedder + "position_embedding_table"]
    tree = {
        encoder + "vision_entry/input_projection/kernel": hf[embedder + "input_proj.weight"].T,
        encoder + "vision_entry/pos_emb_param": table.transpose(1, 0, 2),
        "vision_encoder/Gemma4VisionProjector_0/projection/kernel": hf[
            "model.embed_vision.embedding_projection.weight"
        ].T,
    }
    if vision.standardize:
        tree[encoder + "std_scale"] = hf[tower + "std_scale"]
        tree[encoder + "std_bias"] = hf[tower + "std_bias"]
    for index in range(vision.layers):
        old, new = f"{tower}encoder.layers.{index}.", f"{encoder}layer_{index}/"
        for ours, theirs in {"query": "q", "key": "k", "value": "v"}.items():
            weight = hf[f"{old}self_attn.{theirs}_proj.linear.weight"]
            tree[f"{new}attention/{ours}/kernel"] = weight.T.reshape(
                vision.embed, vision.heads, vision.head_dim
            )
        tree[new + "attention/out/kernel"] = hf[old + "self_attn.o_proj.linear.weight"].T.reshape(
            vision.heads, vision.head_dim, vision.embed
        )
        for ours, theirs in {"wi_0": "gate", "wi_1": "up", "wo": "down"}.items():
            tree[f"{new}mlp/{ours}/kernel"] = hf[f"{old}mlp.{theirs}_proj.linear.weight"].T
        for ours, theirs in {
            "attention/query_norm": "self_attn.q_norm",
            "attention/key_norm": "self_attn.k_norm",
            "pre_attention_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }.items():
            tree[f"{new}{ours}/scale"] = hf[f"{old}{theirs}.weight"]
    return tree


class Case:
    """One checkpoint: transformers' model of it, its facts, and the native encoders over it."""

    def __init__(self, folder, config=None, change=None):
        import torch
        from transformers import Gemma4ForConditionalGeneration

        options = {} if config is None else {"config": config}
        whole = Gemma4ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **options
        ).eval()
        if change is not None:
            with torch.no_grad():
                change(whole.model)
        self.model = whole.model
        self.architecture = (
            read_architecture(folder)
            if config is None
            else parse_architecture(config.to_dict(), Path("config.json"))
        )
        self.hf = {name: value.numpy() for name, value in whole.state_dict().items()}
        self.encoders = {"gemma_jax": (gemma_jax_vision, self.gemma_jax())}
        if not self.architecture.vision.clipped:
            tree = maxtext_vision_tree(self.hf, self.architecture.vision)
            self.encoders["maxtext"] = maxtext_vision, nested(tree)

    def gemma_jax(self):
        return nested(gemma_jax_tree(self.hf, self.architecture))

    def inputs(self, height, width, seed=0):
        """Pixels and positions of one image, by transformers' processor."""
        from PIL import Image
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        vision = self.architecture.vision
        processor = Gemma4ImageProcessorPil(
            patch_size=vision.patch_size,
            max_soft_tokens=70,
            pooling_kernel_size=vision.pooling,
        )
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        found = processor(images=Image.fromarray(noise), return_tensors="np")
        return found["pixel_values"][0], found["image_position_ids"][0]

    def expected(self, pixels, positions):
        """transformers' features of the image [tokens embed]."""
        import torch

        with torch.no_grad():
            found = self.model.get_image_features(
                torch.tensor(pixels[None]), torch.tensor(positions[None]), return_dict=True
            )
        return found.pooler_output[0].numpy()

    def encode(self, layout, pixels, positions, tree=None):
        module, own = self.encoders[layout]
        return np.asarray(
            encoded(module.image_encoder(tree or own, self.architecture, pixels, positions))
        )

    def differences(self, height, width):
        """Largest difference in each layout, over the largest feature."""
        pixels, positions = self.inputs(height, width)
        assert positions.max() < self.architecture.vision.positions
        expected = self.expected(pixels, positions)
        real = int((positions >= 0).all(axis=-1).sum())
        assert expected.shape == (
            real // self.architecture.vision.pooling**2,
            self.architecture.text.embed,
        )
        assert expected.std() > 0.1
        for layout in self.encoders:
            found = self.encode(layout, pixels, positions)
            assert found.dtype == np.float32 and found.shape == expected.shape
            yield layout, np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def cases(tiny):
    return cache(lambda family: Case(tiny(family, dtype="float32", seed=3)))


@pytest.mark.each(1)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_transformers(cases, family, shape):
    found = dict(cases(family).differences(*SHAPES[shape]))
    assert ("maxtext" in found) == (family in WITH_MAXTEXT)
    assert max(found.values()) < LIMIT, found


@pytest.mark.share(4, 3)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_that_needs_no_padding(cases, family):
    side = cases(family).architecture.vision.patch_size * 3
    _, positions = cases(family).inputs(7 * side, 10 * side)
    assert positions.min() == 0
    found = dict(cases(family).differences(7 * side, 10 * side))
    assert max(found.values()) < LIMIT, found


@pytest.mark.share(2)
@pytest.mark.parametrize("family", ["e2b", "31b"])
def test_padding_is_never_seen(cases, family):
    case = cases(family)
    pixels, positions = case.inputs(31, 95)
    padded = (positions < 0).all(axis=-1)
    assert padded.any()
    other = np.where(padded[:, None], 100.0, pixels)
    real = pixels[~padded], positions[~padded]
    for layout in case.encoders:
        found = case.encode(layout, pixels, positions)
        np.testing.assert_array_equal(case.encode(layout, other, positions), found)
        np.testing.assert_allclose(case.encode(layout, *real), found, atol=1e-4)


@pytest.fixture(scope="module")
def odd(tiny):
    """Models whose constants are none of the published ones, and that standardise and clip."""
    import torch
    from transformers import AutoConfig

    def configured(family, **values):
        folder = tiny(family, dtype="float32", seed=3)
        config = AutoConfig.from_pretrained(folder)
        for name, value in values.items():
            setattr(config.vision_config, name, value)
        config.vision_config.rope_parameters = {"rope_type": "axial", "rope_theta": 7.0}
        return folder, config

    def standardise(model):
        scale = model.vision_tower.std_scale
        scale.copy_(torch.linspace(0.5, 1.5, len(scale)))
        model.vision_tower.std_bias.copy_(torch.linspace(1.5, -1.5, len(scale)))

    common = {"pooling_kernel_size": 2, "rms_norm_eps": 0.05}
    makers = {
        "clipped": lambda: Case(*configured("e2b", standardize=True, **common), standardise),
        "plain": lambda: Case(*configured("31b", standardize=False, **common)),
    }
    return cache(lambda kind: makers[kind]())


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("kind", ["clipped", "plain"])
def test_constants_are_those_of_the_config(odd, kind):
    case = odd(kind)
    vision = case.architecture.vision
    assert (vision.pooling, vision.norm_epsilon, vision.rope_theta) == (2, 0.05, 7.0)
    assert (vision.clipped, vision.standardize) == ((kind == "clipped"),) * 2
    found = dict(case.differences(33, 47))
    assert max(found.values()) < LIMIT, found


def test_weights_may_be_stored_in_bfloat16(tiny):
    import ml_dtypes

    case = Case(tiny("e2b"))
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in case.hf.items()}
    tree = nested(gemma_jax_tree(rounded, case.architecture))
    pixels, positions = case.inputs(40, 40)
    np.testing.assert_allclose(
        case.encode("gemma_jax", pixels, positions, tree),
        case.encode("gemma_jax", pixels, positions),
        atol=1e-5,
    )


def test_bounds_bite(cases):
    case = cases("e2b")
    flat = gemma_jax_tree(case.hf, case.architecture)
    inputs = case.inputs(40, 40)
    expected = case.encode("gemma_jax", *inputs)
    bounds = [path for path in flat if path.startswith("vision") and "/clip_" in path]
    assert len(bounds) == 5 * 4
    moved = 0
    for path in bounds:
        open_ended = flat | {path: flat[path] * np.float32(np.inf)}
        found = case.encode("gemma_jax", *inputs, nested(open_ended))
        moved += np.abs(found - expected).max() > 1e-3
    assert moved > len(bounds) / 2


# What is wrong is named


@pytest.mark.parametrize("family", ["e2b", "31b"])
def test_every_missing_array_is_named(cases, family):
    case = cases(family)
    pixels, positions = case.inputs(40, 40)
    trees = {
        "gemma_jax": {
            path: array
            for path, array in gemma_jax_tree(case.hf, case.architecture).items()
            if path.startswith(("vision_encoder/", "embedder/mm_input_projection/"))
        }
    }
    if "maxtext" in case.encoders:
        trees["maxtext"] = maxtext_vision_tree(case.hf, case.architecture.vision)
    for layout, flat in trees.items():
        for path in flat:
            without = {name: array for name, array in flat.items() if name != path}
            with pytest.raises(SourceError) as caught:
                case.encode(layout, pixels, positions, nested(without))
            assert caught.value.expected == path


@pytest.mark.parametrize("module", [gemma_jax_vision, maxtext_vision])
def test_a_model_without_vision_is_refused(tiny, module):
    architecture = read_architecture(tiny("31b", text_only=True))
    with pytest.raises(SourceError, match="no vision tower"):
        module.image_encoder({}, architecture, np.zeros((9, 48)), np.zeros((9, 2), int))


# Parts, by brute force


def test_pooling_is_the_mean_of_each_square():
    import jax.numpy as jnp

    columns, rows, pooling = 6, 4, 2
    grid = np.random.default_rng(0).normal(size=(rows, columns, 5)).astype(np.float32)
    hidden = np.concatenate([grid.reshape(-1, 5), np.full((8, 5), 9.0, np.float32)])
    y, x = np.mgrid[:rows, :columns]
    positions = np.concatenate([np.stack([x, y], -1).reshape(-1, 2), np.full((8, 2), -1)])
    found = np.asarray(pool(jnp.asarray(hidden), jnp.asarray(positions), pooling))
    squares = [
        grid[top : top + 2, left : left + 2].reshape(4, 5).mean(axis=0)
        for top in range(0, rows, 2)
        for left in range(0, columns, 2)
    ]
    np.testing.assert_allclose(found, squares + [np.zeros(5)] * 2, atol=1e-6)


def test_halves_of_a_head_turn_by_x_and_by_y():
    import jax.numpy as jnp

    x = np.random.default_rng(0).normal(size=(1, 1, 8)).astype(np.float32)
    found = np.asarray(rotary(jnp.asarray(x), jnp.asarray([[3, 5]]), 100.0))[0, 0]
    pairs = x[0, 0].reshape(2, 2, 2)
    turned = np.empty_like(pairs)
    for half, place in enumerate((3, 5)):
        for pair, frequency in enumerate((1.0, 0.1)):
            rotation = np.exp(1j * place * frequency)
            number = complex(*pairs[half, :, pair]) * rotation
            turned[half, :, pair] = number.real, number.imag
    np.testing.assert_allclose(found, turned.reshape(-1), atol=1e-5)


# On the checkpoints of the real frameworks


@pytest.mark.share(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_the_frameworks_own_trees(oracle, family):
    case = Case(oracle / "hf" / family)
    case.encoders = {
        "gemma_jax": (gemma_jax_vision, gemma_jax_orbax.restore_tree(oracle / "gemma_jax" / family))
    }
    if family in WITH_MAXTEXT:
        items = oracle / "maxtext" / f"{family}_unscanned" / "0" / "items"
        case.encoders["maxtext"] = maxtext_vision, maxtext_orbax.restore_tree(items)
    for shape in ("square", "wide", "tall"):
        found = dict(case.differences(*SHAPES[shape]))
        assert max(found.values()) < LIMIT, found
