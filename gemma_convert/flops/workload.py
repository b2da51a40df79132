"""One step: how many sequences and tokens, what lies in the cache, how attention is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from gemma_convert.errors import UsageError
from gemma_convert.flops.attention import Rule
from gemma_convert.flops.operations import Part

Mode = Literal["train", "prefill", "decode"]
Recomputation = Literal["none", "full"]


@dataclass(frozen=True)
class Workload:
    """One step of `batch` sequences of `tokens` each, behind `cached` tokens in decoding.

    `logits` are the positions of a sequence whose logits are computed. `images` and `sounds` are
    those in each sequence; their soft tokens are among its `tokens`.
    """

    mode: Mode
    batch: int
    tokens: int
    cached: int
    logits: int
    rule: Rule = "exact"
    images: int = 0
    image_tokens: int = 0
    sounds: int = 0
    sound_tokens: int = 0
    bidirectional_images: bool = False
    frozen: frozenset[Part] = frozenset()
    recomputation: Recomputation = "none"

    def __post_init__(self) -> None:
        soft = self.images * self.image_tokens + self.sounds * self.sound_tokens
        if soft > self.tokens:
            raise UsageError(
                "The soft tokens of images and sounds do not fit into a sequence.",
                expected=f"at most {self.tokens}",
                found=soft,
                do="take a longer --seq-len, or fewer or smaller images and sounds",
            )


def train(batch: int, tokens: int) -> Workload:
    """A training step, everything trained."""
    return Workload("train", batch, tokens, 0, tokens)


def prefill(batch: int, tokens: int) -> Workload:
    """A forward pass with the logits of every position."""
    return Workload("prefill", batch, tokens, 0, tokens)


def decode(batch: int, cached: int) -> Workload:
    """One new token for each sequence, which attends to itself and to `cached` tokens before."""
    return Workload("decode", batch, 1, cached, 1)


STEPS: Mapping[Mode, Callable[[int, int], Workload]] = {
    "train": train,
    "prefill": prefill,
    "decode": decode,
}
"""Each mode's step of so many sequences, and of so many tokens each."""
