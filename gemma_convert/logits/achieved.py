"""How much a check multiplies: the model FLOPs of one forward pass over its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gemma_convert.flops.count import count
from gemma_convert.flops.gemma4 import gemma4
from gemma_convert.flops.workload import Workload, prefill
from gemma_convert.model.architecture import Architecture
from gemma_convert.prompts.images import ImageSequence
from gemma_convert.prompts.sounds import SoundSequence
from gemma_convert.prompts.text import TokenSequence


def forward_flops(architecture: Architecture, sequences: Sequence[TokenSequence]) -> int:
    """FLOPs of a forward pass of all sequences, with the logits of compared positions alone.

    Counted is what the model needs: no masked pairs, no padding of images or sounds.
    """
    model = gemma4(architecture)
    return sum(count(model, _work(one, architecture)).total for one in sequences)


def _work(sequence: TokenSequence, architecture: Architecture) -> Workload:
    step = replace(prefill(1, len(sequence.ids)), logits=int(sequence.compared.sum()))
    if isinstance(sequence, ImageSequence):
        return replace(
            step,
            images=1,
            image_tokens=int(sequence.places.sum()),
            bidirectional_images=architecture.text.bidirectional_images,
        )
    if isinstance(sequence, SoundSequence):
        return replace(step, sounds=1, sound_tokens=int(sequence.places.sum()))
    return step
