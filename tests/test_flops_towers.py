"""Images and sounds: the counter on a whole tiny Gemma 4, forward and backward, parts frozen."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from gemma_convert.flops.count import count
from gemma_convert.flops.model import Model
from gemma_convert.flops.source import read_model
from gemma_convert.flops.towers import AUDIO_WINDOW, audio_pair_flops
from gemma_convert.flops.workload import prefill, train
from gemma_convert.model.architecture import AudioEmbedder, VisionEmbedder

BATCH, TOKENS, IMAGES, IMAGE_TOKENS, SOUND_TOKENS = 2, 41, 2, 6, 17
IMAGE = {"images": IMAGES, "image_tokens": IMAGE_TOKENS}
SOUND = {"sounds": 1, "sound_tokens": SOUND_TOKENS}

MODULES = {
    "vision": "vision_tower",
    "vision-projector": "embed_vision",
    "audio": "audio_tower",
    "audio-projector": "embed_audio",
    "text": "language_model",
}


@pytest.fixture(scope="module")
def model_of(tiny):
    """transformers' whole model of a tiny family, made once."""
    import torch
    from transformers import AutoModelForImageTextToText

    made: dict[str, torch.nn.Module] = {}

    def make(family: str):
        if family not in made:
            made[family] = AutoModelForImageTextToText.from_pretrained(
                tiny(family),
                attn_implementation="eager",
                experts_implementation="batched_mm",
                dtype=torch.float32,
            ).eval()
        return made[family]

    return make


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def arguments(model, sounds: bool) -> dict:
    """A batch: each sequence has two images and, if asked for, one sound."""
    import torch

    config = model.config
    ids = torch.full((BATCH, TOKENS), 5)
    kinds = torch.zeros_like(ids)
    for start in (2, 2 + IMAGE_TOKENS + 1):
        ids[:, start : start + IMAGE_TOKENS] = config.image_token_id
        kinds[:, start : start + IMAGE_TOKENS] = 1
    patches, size = patches_of(config.vision_config)
    width = patches // 3
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(width), indexing="ij")
    place = torch.stack([columns.flatten(), rows.flatten()], -1)
    found = {
        "input_ids": ids,
        "mm_token_type_ids": kinds,
        "pixel_values": torch.rand(BATCH * IMAGES, patches, 3 * size**2),
        "image_position_ids": place.expand(BATCH * IMAGES, -1, -1),
    }
    if sounds:
        ids[:, -SOUND_TOKENS - 1 : -1] = config.audio_token_id
        frames, bands = frames_of(config.audio_config)
        found["input_features"] = torch.rand(BATCH, frames, bands)
        found["input_features_mask"] = torch.ones(BATCH, frames, dtype=torch.bool)
    return found


def patches_of(config) -> tuple[int, int]:
    """Patches of an image and the pixels on a side of one; 12B's are merged beforehand."""
    if config.model_type == "gemma4_unified_vision":
        return IMAGE_TOKENS, config.model_patch_size
    return IMAGE_TOKENS * config.pooling_kernel_size**2, config.patch_size


def frames_of(config) -> tuple[int, int]:
    """Frames of a sound and the numbers in one: mel bands, or 12B's raw samples."""
    if config.model_type == "gemma4_unified_audio":
        return SOUND_TOKENS, config.audio_embed_dim
    return 4 * SOUND_TOKENS, config.subsampling_conv_channels[0]


def measured(model, sounds: bool, backward: bool) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    inputs = arguments(model, sounds)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = model(**inputs, use_cache=False).logits
        if backward:
            logits.sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


def pooling(model: Model, images: int = BATCH * IMAGES) -> int:
    """transformers averages patches by a product with a matrix of which patch goes where.

    12B averages none.
    """
    if isinstance(model.vision, VisionEmbedder):
        return 0
    patches = IMAGE_TOKENS * model.vision.pooling**2
    return images * 2 * IMAGE_TOKENS * patches * model.vision.embed


def depthwise_gradients(model: Model) -> int:
    """torch's formula for gradients of convolution weights passes over groups.

    It takes a gradient for every pair of channels, where a depthwise convolution has one for each.
    """
    audio = model.audio
    if isinstance(audio, AudioEmbedder):
        return 0
    forward = 2 * BATCH * SOUND_TOKENS * audio.kernel * audio.embed
    return audio.layers * (audio.embed - 1) * forward


@pytest.mark.share(3)
@pytest.mark.parametrize("family", ["e2b", "e4b", "26b-a4b", "31b"])
def test_a_forward_pass_with_images_equals_the_counter(family, tiny, model_of):
    model = read_model(tiny(family))
    found = count(model, replace(prefill(BATCH, TOKENS), rule="dense", **IMAGE)).total
    assert measured(model_of(family), False, False) == found + pooling(model)


@pytest.mark.share(3, 1)
@pytest.mark.parametrize("family", ["e2b", "e4b", "12b"])
def test_a_forward_pass_with_images_and_sounds_equals_the_counter(family, tiny, model_of):
    model = read_model(tiny(family))
    found = count(model, replace(prefill(BATCH, TOKENS), rule="dense", **IMAGE, **SOUND)).total
    assert measured(model_of(family), True, False) == found + pooling(model)


FROZEN = [
    (),
    ("vision",),
    ("vision", "vision-projector"),
    ("vision-projector",),
    ("text",),
    ("text", "vision"),
    ("text", "vision", "audio"),
    ("text", "vision", "vision-projector", "audio-projector"),
    ("vision", "audio"),
    ("vision", "vision-projector", "audio", "audio-projector"),
    ("text", "vision", "vision-projector", "audio"),
]


@pytest.mark.share(6)
@pytest.mark.parametrize("frozen", FROZEN, ids="+".join)
def test_a_training_step_with_frozen_parts_equals_the_counter(frozen, tiny, model_of):
    theirs, model = model_of("e2b"), read_model(tiny("e2b"))
    theirs.requires_grad_(True)
    for part in frozen:
        getattr(theirs.model, MODULES[part]).requires_grad_(False)
    work = replace(train(BATCH, TOKENS), rule="dense", **IMAGE, **SOUND, frozen=frozenset(frozen))
    extra = pooling(model) * (1 if "vision" in frozen else 2)
    extra += 0 if "audio" in frozen else depthwise_gradients(model)
    assert measured(theirs, True, True) == count(model, work).total + extra


FROZEN_IN_12B = [
    (),
    ("vision",),
    ("vision", "vision-projector"),
    ("vision", "text"),
    ("vision-projector",),
    ("text", "vision-projector"),
    ("text", "vision-projector", "audio-projector"),
    ("text", "vision", "audio-projector"),
    ("vision", "vision-projector", "audio-projector"),
]


@pytest.mark.share(3)
@pytest.mark.parametrize("frozen", FROZEN_IN_12B, ids="+".join)
def test_a_training_step_of_12b_equals_the_counter(frozen, tiny, model_of):
    """A norm with weights stands before the map of patches, so that its input has a gradient."""
    theirs, model = model_of("12b"), read_model(tiny("12b"))
    theirs.requires_grad_(True)
    for part in frozen:
        for module in modules_of_12b(theirs.model, part):
            module.requires_grad_(False)
    work = replace(train(BATCH, TOKENS), rule="dense", **IMAGE, **SOUND, frozen=frozenset(frozen))
    assert measured(theirs, True, True) == count(model, work).total


def modules_of_12b(model, part: str) -> list:
    """The modules, or parameters, of a part: the projector stands inside of the embedder."""
    vision = model.embed_vision
    projector = vision.multimodal_embedder
    own = [one for name, one in vision.named_children() if one is not projector]
    return {
        "text": [model.language_model],
        "vision": [*own, vision.pos_embedding],
        "vision-projector": [projector],
        "audio-projector": [model.embed_audio],
    }[part]


@pytest.mark.parametrize("tokens", [1, 5, 11, 12, 13, 24, 40])
def test_pairs_of_the_audio_tower_are_those_of_its_mask(tokens):
    import torch
    from transformers.models.gemma4.modeling_gemma4 import sliding_window_mask_function

    seen = sliding_window_mask_function((12, 0))
    places = torch.arange(tokens)
    pairs = int(seen(0, 0, places[:, None], places[None]).sum())
    assert audio_pair_flops(tokens, "exact") == (2 * pairs, 2 * pairs)
    assert AUDIO_WINDOW == 12
