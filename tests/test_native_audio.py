"""The audio encoder over the gemma library's tree gives transformers' audio features.

transformers' own float32 noise here is about 1e-6 of the largest feature.
"""

from functools import cache

import numpy as np
import pytest
from gemma_jax_by_hand import gemma_jax_tree
from test_native_vision import nested

from gemma_convert.errors import SourceError
from gemma_convert.forward.encoder import encoded
from gemma_convert.layouts.gemma_jax import tree as gemma_jax_orbax
from gemma_convert.layouts.gemma_jax.audio import sound_encoder
from gemma_convert.model.config import read_architecture

FAMILIES = ("e2b", "e4b")
LIMIT = 1e-5


class Case:
    """One checkpoint: transformers' model of it, its facts, and its native tree."""

    def __init__(self, folder, change=None):
        import torch
        from transformers import Gemma4ForConditionalGeneration

        whole = Gemma4ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        if change is not None:
            with torch.no_grad():
                change(whole.model.audio_tower)
        self.model = whole.model
        self.architecture = read_architecture(folder)
        self.hf = {name: value.numpy() for name, value in whole.state_dict().items()}
        self.flat = gemma_jax_tree(self.hf, self.architecture)
        self.tree = nested(self.flat)

    def features(self, frames, seed=0):
        """Random log-mel features [frames mel]."""
        mel = 4 * self.architecture.audio.frequencies
        return np.random.default_rng(seed).normal(-1, 2, (frames, mel)).astype(np.float32)

    def expected(self, features, mask):
        """transformers' features of the frames that the mask keeps [tokens embed]."""
        import torch

        with torch.no_grad():
            found = self.model.get_audio_features(
                torch.tensor(features[None]), torch.tensor(mask[None]), return_dict=True
            )
        return found.pooler_output[0][found.attention_mask[0]].numpy()

    def encode(self, features, mask=None, tree=None):
        return np.asarray(
            encoded(sound_encoder(tree or self.tree, self.architecture, features, mask))
        )

    def difference(self, features, mask=None):
        """Largest difference over the largest feature."""
        expected = self.expected(features, np.ones(len(features), bool) if mask is None else mask)
        found = self.encode(features, mask)
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.isfinite(expected).all() and expected.std() > 0.1
        return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def cases(tiny):
    return cache(lambda family: Case(tiny(family, dtype="float32", seed=4)))


@pytest.mark.share(5, 1)
@pytest.mark.parametrize("frames", [1, 50, 203])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_transformers(cases, family, frames):
    """1, 13 and 51 soft tokens: transformers attends in chunks of 12."""
    case = cases(family)
    features = case.features(frames)
    assert len(case.encode(features)) == -(-frames // 4)
    assert case.difference(features) < LIMIT


@pytest.mark.share(2)
@pytest.mark.parametrize("samples", [1000, 8003, 20000])
def test_a_clip_as_the_feature_extractor_gives_it(cases, tiny, samples):
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(tiny("e2b", dtype="float32", seed=4))
    clip = np.random.default_rng(1).normal(0, 0.1, samples).astype(np.float32)
    found = extractor([clip], return_tensors="np")
    features, mask = found["input_features"][0], found["input_features_mask"][0]
    assert cases("e2b").difference(features, mask) < LIMIT


def test_frames_that_the_mask_leaves_out_are_never_seen(cases):
    case = cases("e2b")
    features, mask = case.features(50), np.arange(50) < 41
    assert case.difference(features, mask) < LIMIT
    other = np.where(mask[:, None], features, 77)
    np.testing.assert_array_equal(case.encode(other, mask), case.encode(features, mask))
    with pytest.raises(ValueError, match="at the end"):
        case.encode(features, ~mask)


def test_activations_are_clipped_where_transformers_clips_them(tiny):
    """Two channels beyond 1e10 on the way in, then every inner product of the second layer.

    The first layer's last norm lets the other channels through, which saw what the two became.
    """

    def enlarge(tower):
        scale = np.ones(tower.config.hidden_size, np.float32)
        scale[3], scale[17] = 3e13, -1e12
        vector = tower.output_proj.weight.new_tensor(scale)[:, None]
        tower.subsample_conv_projection.input_proj_linear.weight.mul_(vector)
        tower.layers[0].norm_out.weight.mul_(1e10 * (vector[:, 0] == 1) + (vector[:, 0] != 1))
        second = tower.layers[1]
        for linear in (
            second.feed_forward1.ffw_layer_2,
            second.feed_forward2.ffw_layer_2,
            second.self_attn.post,
        ):
            linear.linear.weight.mul_(vector)
            linear.output_min.fill_(-np.inf)
            linear.output_max.fill_(np.inf)
        second.lconv1d.depthwise_conv1d.weight.mul_(vector[:, :, None])

    case = Case(tiny("e2b", dtype="float32", seed=4), enlarge)
    assert case.difference(case.features(50)) < LIMIT


def test_bounds_bite(cases):
    case = cases("e2b")
    features = case.features(50)
    expected = case.encode(features)
    bounds = [path for path in case.flat if path.startswith("audio") and "/clip_" in path]
    assert len(bounds) == case.architecture.audio.layers * 10 * 4
    moved = 0
    for path in bounds:
        open_ended = case.flat | {path: case.flat[path] * np.float32(np.inf)}
        moved += np.abs(case.encode(features, tree=nested(open_ended)) - expected).max() > 1e-3
    assert moved > len(bounds) / 2


def test_weights_may_be_stored_in_bfloat16(tiny):
    import ml_dtypes

    case = Case(tiny("e2b"))
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in case.hf.items()}
    tree = nested(gemma_jax_tree(rounded, case.architecture))
    features = case.features(50)
    np.testing.assert_allclose(case.encode(features, tree=tree), case.encode(features), atol=1e-5)


def test_every_missing_array_is_named(cases):
    case = cases("e2b")
    features = case.features(1)
    read = [
        path
        for path in case.flat
        if path.startswith(("audio_encoder/", "embedder/audio_input_projection/"))
    ]
    for path in read:
        without = {name: array for name, array in case.flat.items() if name != path}
        with pytest.raises(SourceError) as caught:
            case.encode(features, tree=nested(without))
        assert caught.value.expected == path


def test_a_model_without_audio_is_refused(tiny):
    architecture = read_architecture(tiny("31b"))
    with pytest.raises(SourceError, match="no audio tower"):
        sound_encoder({}, architecture, np.zeros((9, 52), np.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_the_librarys_own_tree(oracle, family):
    case = Case(oracle / "hf" / family)
    case.tree = gemma_jax_orbax.restore_tree(oracle / "gemma_jax" / family)
    for frames in (7, 48, 301):
        assert case.difference(case.features(frames)) < LIMIT
