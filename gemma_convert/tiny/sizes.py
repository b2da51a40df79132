"""Sizes of the tiny model of each family.

No two axes of a model share a size, so that no two can be confused by shape: heads and KV heads,
KV heads of sliding and full layers, a hidden size and heads times head_dim all differ (the audio
tower's architecture ties that last pair). No hidden size has a whole root, which would hide
scaling mistakes. Periods and features are those of google/gemma-4-{E2B,E4B,26B-A4B,31B}-it and of
google/gemma-4-12B.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_convert.model.architecture import Family

POOLING = 3
"""Patches on a side of the square that becomes one soft token."""


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of the vision tower; `heads * head_dim` differs from `embed` on purpose."""

    embed: int
    heads: int
    mlp: int
    patch_size: int
    positions: int
    head_dim: int = 8
    layers: int = 3


@dataclass(frozen=True)
class AudioSizes:
    """Sizes of the audio tower. It reads as many mel bands as its first convolution has channels.

    `channels[0]` is a multiple of four, so that a quarter of the bands is left after two
    convolutions, which is what the projection behind them is built for.
    """

    embed: int
    output: int
    channels: tuple[int, int]
    heads: int = 4
    layers: int = 2
    kernel: int = 5


@dataclass(frozen=True)
class EmbedderSizes:
    """Sizes of 12B's embedders; `embed` differs from the text model's on purpose."""

    embed: int
    patch_size: int
    positions: int
    frame: int


@dataclass(frozen=True)
class FamilySizes:
    """Sizes and features of one family. `shared` is the published share of KV-shared layers."""

    period: int
    layers: int
    vocab: int
    embed: int
    heads: int
    kv_heads: int
    full_head_dim: int
    mlp: int
    window: int
    vision: VisionSizes | EmbedderSizes
    audio: AudioSizes | None = None
    head_dim: int = 16
    full_kv_heads: int | None = None
    ple: int = 0
    shared: tuple[int, int] = (0, 1)
    double_wide: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_mlp: int = 0

    @property
    def unified(self) -> bool:
        """Whether it is 12B's: embedders in the place of towers."""
        return isinstance(self.vision, EmbedderSizes)


SIZES: dict[Family, FamilySizes] = {
    "e2b": FamilySizes(
        period=5,
        layers=15,
        vocab=307,
        embed=44,
        heads=12,
        kv_heads=6,
        full_head_dim=24,
        mlp=68,
        window=8,
        ple=20,
        shared=(4, 7),
        double_wide=True,
        vision=VisionSizes(embed=60, heads=7, mlp=76, patch_size=4, positions=233),
        audio=AudioSizes(embed=40, output=26, channels=(52, 11)),
    ),
    "e4b": FamilySizes(
        period=6,
        layers=18,
        vocab=311,
        embed=52,
        heads=14,
        kv_heads=7,
        full_head_dim=32,
        mlp=84,
        window=8,
        ple=22,
        shared=(3, 7),
        vision=VisionSizes(embed=56, heads=9, mlp=100, patch_size=5, positions=239),
        audio=AudioSizes(embed=40, output=34, channels=(60, 13)),
    ),
    "12b": FamilySizes(
        period=6,
        layers=12,
        vocab=331,
        embed=76,
        heads=20,
        kv_heads=10,
        full_kv_heads=5,
        full_head_dim=24,
        mlp=112,
        window=12,
        vision=EmbedderSizes(embed=58, patch_size=3, positions=257, frame=32),
    ),
    "26b-a4b": FamilySizes(
        period=6,
        layers=12,
        vocab=313,
        embed=88,
        heads=20,
        kv_heads=10,
        full_kv_heads=5,
        full_head_dim=32,
        mlp=104,
        window=12,
        experts=11,
        experts_per_token=4,
        expert_mlp=40,
        vision=VisionSizes(embed=60, heads=7, mlp=76, patch_size=4, positions=241),
    ),
    "31b": FamilySizes(
        period=6,
        layers=12,
        vocab=317,
        embed=68,
        heads=18,
        kv_heads=9,
        full_kv_heads=6,
        full_head_dim=24,
        mlp=116,
        window=12,
        vision=VisionSizes(embed=52, heads=7, mlp=92, patch_size=5, positions=251),
    ),
}
"""The tiny model of each family."""
