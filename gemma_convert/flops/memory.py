"""Bytes that a training step holds, estimated from config.json alone.

Counted are the weights of the parts that the step runs, without norms, biases and scalars (less
than a thousandth): matrices and tables. A trained weight has a gradient of its own dtype, Adam's
two moments in float32, and float32 master weights beside it where it is not float32 itself.

Activations are what the backward pass needs: of each operation its output (`Operation.kept`), of
each block also its input before and after its norm, in bfloat16; logits in float32. Attention is
computed in blocks, as flash attention does, so that scores and probabilities are not kept
(https://arxiv.org/abs/2205.05198, section 4, counts a plain transformer so). With full
recomputation each layer keeps its input alone, and the largest layer, run again, all of its own.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from gemma_convert.flops.count import Count, Counted
from gemma_convert.flops.model import Model
from gemma_convert.flops.operations import Part
from gemma_convert.flops.workload import Workload
from gemma_convert.model.architecture import AudioArchitecture, VisionArchitecture

WeightDType = Literal["bf16", "fp32"]

WIDTHS: dict[WeightDType, int] = {"bf16": 2, "fp32": 4}
"""Bytes of a weight."""

MOMENTS, MASTER = 8, 4
"""Bytes of Adam's two moments, and of a master weight, all float32."""

ACTIVATION, LOGIT = 2, 4
"""Bytes of a kept value: bfloat16, and float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes over all devices. `activations` is None where no gradient is computed."""

    weight_dtype: WeightDType
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


def memory(count: Count, dtype: WeightDType = "bf16") -> Memory:
    """What the step holds whose FLOPs are counted, its weights in `dtype`."""
    held = parameters(count)
    training = count.work.mode == "train"
    trained = sum(held[part] for part in set(held) - count.work.frozen) if training else 0
    master = 0 if dtype == "fp32" else MASTER
    return Memory(
        weight_dtype=dtype,
        parameters=sum(held.values()),
        weights=WIDTHS[dtype] * sum(held.values()),
        gradients=WIDTHS[dtype] * trained,
        optimizer=(MOMENTS + master) * trained,
        activations=_activations(count) if training else None,
    )


def parameters(count: Count) -> dict[Part, int]:
    """Parameters of each part that the step runs: matrices that are multiplied, and tables."""
    held = _tables(count.model, count.work)
    for one in count.operations:
        held[one.operation.part] += one.operation.parameters
    return held


def _tables(model: Model, work: Workload) -> dict[Part, int]:
    """Tables of embeddings and positions; a tied embedding is the vocabulary's matrix."""
    held: dict[Part, int] = defaultdict(int)
    held["text"] = model.ple_vocab * len(model.layers) * model.ple
    held["text"] += 0 if model.tied else model.vocab * model.embed
    if work.images and model.vision is not None:
        held["vision"] = 2 * model.vision.positions * model.vision.embed
    return held


def _activations(count: Count) -> int:
    outside, layers = 0, defaultdict[tuple[Part, int], int](int)
    for one in count.operations:
        place = one.operation.layer
        if one.backward and place is None:
            outside += _kept(one)
        elif one.backward and place is not None:
            layers[one.operation.part, place] += _kept(one)
    if count.work.recomputation == "none" or not layers:
        return outside + sum(layers.values())
    inputs = sum(ACTIVATION * _layer_input(count, part) for part, _ in layers)
    return outside + inputs + max(layers.values())


def _kept(one: Counted) -> int:
    width = LOGIT if one.operation.component == "vocabulary" else ACTIVATION
    return width * one.operation.kept


def _layer_input(count: Count, part: Part) -> int:
    """Values that one layer of a part reads."""
    work, vision, audio = count.work, count.model.vision, count.model.audio
    if part == "vision" and isinstance(vision, VisionArchitecture):
        return work.batch * work.images * work.image_tokens * vision.pooling**2 * vision.embed
    if part == "audio" and isinstance(audio, AudioArchitecture):
        return work.batch * work.sounds * work.sound_tokens * audio.embed
    return work.batch * work.tokens * count.model.embed
