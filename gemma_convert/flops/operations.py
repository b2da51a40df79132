"""One kind of matrix multiplication in a step, and what its backward pass costs.

A multiply-add is two FLOPs. Norms, activations, softmax, rotary embeddings and lookups are not
counted, as is usual for model FLOPs (PaLM, https://arxiv.org/abs/2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["text", "vision", "vision-projector", "audio", "audio-projector"]
Block = Literal["attention", "feed-forward", "other"]


UPSTREAM: Mapping[Part, tuple[Part, ...]] = {
    "text": ("vision", "vision-projector", "audio", "audio-projector"),
    "vision": (),
    "vision-projector": ("vision",),
    "audio": (),
    "audio-projector": ("audio",),
}
"""Parts whose output a part reads, so that their gradients pass through it."""

BLOCKS: Mapping[str, Block] = {
    "q projection": "attention",
    "k projection": "attention",
    "v projection": "attention",
    "o projection": "attention",
    "KV compression": "attention",
    "KV expansion": "attention",
    "relative positions": "attention",
    "attention scores": "attention",
    "attention values": "attention",
    "linear attention projections": "attention",
    "linear attention convolution": "attention",
    "delta rule": "attention",
    "linear attention output": "attention",
    "MLP": "feed-forward",
    "router": "feed-forward",
    "experts": "feed-forward",
    "shared experts": "feed-forward",
    "convolution": "other",
    "PLE": "other",
    "vocabulary": "other",
    "patch embedding": "other",
    "subsampling": "other",
    "output": "other",
    "projector": "other",
}
"""Every component, and the block of a layer that it belongs to."""


@dataclass(frozen=True)
class Operation:
    """FLOPs of one component of one layer in the forward pass of a step.

    `layer` is None for what stands outside the layers. `parameters` are those of its weights, none
    where neither factor is one, as in attention scores. `kept` are the values that the backward
    pass needs of it (`gemma_convert.flops.memory`). `entry` marks what reads data, constants or
    other parts' output alone, so that no weight of its own part lies below it.
    """

    component: str
    flops: int
    part: Part = "text"
    layer: int | None = None
    parameters: int = 0
    kept: int = 0
    entry: bool = False

    @property
    def weighted(self) -> bool:
        """Whether one factor is a weight, and the other is not."""
        return self.parameters > 0

    def backward(self, trained: Collection[Part]) -> int:
        """FLOPs of its backward pass where the weights of the parts `trained` are.

        A gradient of a factor costs as much as the forward pass. A weight has one where it is
        trained; an input where any trained weight lies below it.
        """
        own = self.part in trained
        below = (own and not self.entry) or any(part in trained for part in UPSTREAM[self.part])
        inputs = self.flops * (1 if self.weighted else 2) if below else 0
        return inputs + (self.flops if own and self.weighted else 0)


def matmul(rows: int, inner: int, outer: int) -> int:
    """FLOPs of [rows inner] · [inner outer]."""
    return 2 * rows * inner * outer


def linear(
    component: str,
    rows: int,
    inner: int,
    outer: int,
    part: Part = "text",
    layer: int | None = None,
    *,
    keeps: int = 0,
    entry: bool = False,
) -> Operation:
    """[rows inner] · a weight [inner outer].

    The backward pass needs its output, and `keeps` further values of each row.
    """
    flops, kept = matmul(rows, inner, outer), rows * (outer + keeps)
    return Operation(component, flops, part, layer, inner * outer, kept, entry)
