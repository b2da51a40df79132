"""FLOPs of Gemma 4's vision and audio towers and their projectors, in the forward pass.

Source: transformers 5.23, `models/gemma4/modeling_gemma4.py` and, for the embedders of 12B,
`models/gemma4_unified/modeling_gemma4_unified.py`. Towers see one image or one sound at a time,
without padding.
"""

from __future__ import annotations

from collections.abc import Iterator

from gemma_convert.flops.attention import Reach, Rule, pair_flops
from gemma_convert.flops.layers import gated_mlp
from gemma_convert.flops.operations import Operation, linear
from gemma_convert.flops.workload import Workload
from gemma_convert.model.architecture import (
    AudioArchitecture,
    AudioEmbedder,
    VisionArchitecture,
    VisionEmbedder,
)

AUDIO_WINDOW = 12
"""Keys that a query of the audio tower sees, itself included; also the length of its blocks."""

_AUDIO_BLOCK, _AUDIO_CONTEXT, _AUDIO_POSITIONS = 12, 24, 13
"""What is computed before masking: for each block of queries, keys, and relative positions."""

_CONVOLUTION = 9
"""Taps of a convolution over three frames and three bands."""


def images(
    vision: VisionArchitecture | VisionEmbedder, embed: int, work: Workload
) -> Iterator[Operation]:
    """What images cost before the decoder: a tower, or 12B's embedder, and a projector."""
    if isinstance(vision, VisionEmbedder):
        return vision_embedder(vision, embed, work)
    return vision_tower(vision, embed, work)


def sounds(
    audio: AudioArchitecture | AudioEmbedder, embed: int, work: Workload
) -> Iterator[Operation]:
    """What sounds cost before the decoder: a tower and a projector, or the projector of 12B."""
    if isinstance(audio, AudioEmbedder):
        return audio_embedder(audio, embed, work)
    return audio_tower(audio, embed, work)


def vision_embedder(vision: VisionEmbedder, embed: int, work: Workload) -> Iterator[Operation]:
    """One linear map of each patch, which is a soft token, and the projector.

    A norm with weights stands before the map, so that in training its input has a gradient too.
    """
    rows = work.batch * work.images * work.image_tokens
    yield linear("patch embedding", rows, vision.patch, vision.embed, "vision")
    yield linear("projector", rows, vision.embed, embed, "vision-projector", entry=True)


def audio_embedder(audio: AudioEmbedder, embed: int, work: Workload) -> Iterator[Operation]:
    """The projector, which reads raw samples."""
    rows = work.batch * work.sounds * work.sound_tokens
    yield linear("projector", rows, audio.frame, embed, "audio-projector", entry=True)


def vision_tower(vision: VisionArchitecture, embed: int, work: Workload) -> Iterator[Operation]:
    """Patch embedding, layers, and the projector into `embed` channels.

    An image of n soft tokens has n · pooling² patches, all of which see each other. Pooling is an
    average and not counted.
    """
    images = work.batch * work.images
    patches = work.image_tokens * vision.pooling**2
    rows, heads = images * patches, vision.heads * vision.head_dim
    pairs = 2 * images * patches**2 * heads
    width = vision.embed
    yield linear("patch embedding", rows, vision.patch, width, "vision", entry=True)
    for layer in range(vision.layers):
        yield linear("q projection", rows, width, heads, "vision", layer, keeps=2 * width)
        yield linear("k projection", rows, width, heads, "vision", layer)
        yield linear("v projection", rows, width, heads, "vision", layer)
        yield Operation("attention scores", pairs, "vision", layer)
        yield Operation("attention values", pairs, "vision", layer, kept=rows * heads)
        yield linear("o projection", rows, heads, width, "vision", layer)
        yield gated_mlp("MLP", rows, width, vision.mlp, "vision", layer)
    soft = images * work.image_tokens
    yield linear("projector", soft, width, embed, "vision-projector", entry=True)


def audio_tower(audio: AudioArchitecture, embed: int, work: Workload) -> Iterator[Operation]:
    """Two convolutions, conformer layers, output, and the projector into `embed` channels.

    A sound of n soft tokens has 4 · n frames of as many bands as the first convolution has
    channels; each convolution halves frames and bands.
    """
    sounds = work.batch * work.sounds
    rows, width = sounds * work.sound_tokens, audio.embed
    first, last = audio.channels
    halved = 2 * rows * 2 * audio.frequencies
    yield linear("subsampling", halved, _CONVOLUTION, first, "audio", entry=True)
    yield linear("subsampling", rows * audio.frequencies, _CONVOLUTION * first, last, "audio")
    yield linear("subsampling", rows, audio.frequencies * last, width, "audio")
    for layer in range(audio.layers):
        yield from _conformer(audio, layer, sounds, work)
    yield linear("output", rows, width, audio.output, "audio")
    yield linear("projector", rows, audio.output, embed, "audio-projector", entry=True)


def _conformer(
    audio: AudioArchitecture, layer: int, sounds: int, work: Workload
) -> Iterator[Operation]:
    rows, width = sounds * work.sound_tokens, audio.embed
    keys, positions = audio_pair_flops(work.sound_tokens, work.rule)
    yield linear("MLP", rows, width, 16 * width, "audio", layer, keeps=6 * width)
    yield linear("q projection", rows, width, width, "audio", layer, keeps=2 * width)
    for name in ("k", "v", "o"):
        yield linear(f"{name} projection", rows, width, width, "audio", layer)
    table = linear("relative positions", _AUDIO_POSITIONS, width, width, "audio", layer, entry=True)
    yield table
    scores = sounds * (keys + positions) * width
    yield Operation("attention scores", scores, "audio", layer)
    values = sounds * keys * width
    yield Operation("attention values", values, "audio", layer, kept=rows * width)
    yield linear("convolution", rows, width, 3 * width, "audio", layer, keeps=2 * width)
    yield linear("convolution", rows, audio.kernel, width, "audio", layer)


def audio_pair_flops(tokens: int, rule: Rule) -> tuple[int, int]:
    """FLOPs of one channel of the scores with keys and with relative positions.

    Every pair that the mask lets through has one relative position.
    """
    if rule == "dense":
        padded = -(-tokens // _AUDIO_BLOCK) * _AUDIO_BLOCK
        return 2 * padded * _AUDIO_CONTEXT, 2 * padded * _AUDIO_POSITIONS
    pairs = pair_flops(Reach("sliding", AUDIO_WINDOW), tokens, 0, rule)
    return pairs, pairs
